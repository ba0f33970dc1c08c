/**
 * RPC with one peer over one kept stream, `/archipelag/rpc/1.0.0`.
 *
 * A frame is its length (4 bytes, big-endian) and a MessagePack map whose `type` says what it is: q request, r reply,
 * x refusal, c abandon, n notice, p ping, o pong. Bodies are MessagePack maps of the method's own, carried as bytes.
 * The first request on a stream is `hello`; until it is answered, the other side answers nothing else.
 */
import { decode, encode } from '@msgpack/msgpack'

export const RPC_PROTOCOL = '/archipelag/rpc/1.0.0'

/** Bytes of one frame, as the other side allows (a body of 256 KiB and what is around it). */
export const MAX_FRAME_BYTES = 256 * 1024 + 256

/** Requests that may be open at once on one link; the other side refuses more. */
export const MAX_OPEN_CALLS = 64

/** A peer that says nothing for so long is gone: it sends a ping each second. */
export const DEAD_AFTER_MS = 15_000

const LENGTH_BYTES = 4
// Integers beyond 2**53 (coordinates, civil time in nanoseconds) come as BigInt, all others as Number.
const OPTIONS = { useBigInt64: true }

/** The peer answered that it will not or can not, or did not answer in time. */
export class CallFailed extends Error {
  /** @param {string} code unknown-method, busy, malformed, deadline or failed @param {string} detail */
  constructor (code, detail) {
    super(detail ? `${code}: ${detail}` : code)
    this.name = 'CallFailed'
    this.code = code
  }
}

/** The link ended, or the peer broke the protocol. */
export class LinkLost extends Error {
  /** @param {string} reason */
  constructor (reason) {
    super(reason)
    this.name = 'LinkLost'
  }
}

/** Map to MessagePack bytes. Numbers beyond 32 bits are given as BigInt. @param {object} message */
export function pack (message) {
  return encode(message, OPTIONS)
}

/** MessagePack bytes from a peer to a map. Throws if they are none. @param {Uint8Array} bytes */
export function unpack (bytes) {
  const message = decode(bytes, { ...OPTIONS, maxStrLength: bytes.length, maxBinLength: bytes.length, maxArrayLength: bytes.length, maxMapLength: bytes.length, maxExtLength: 0 })
  if (message === null || typeof message !== 'object' || Array.isArray(message) || message instanceof Uint8Array) {
    throw new TypeError('a map was expected')
  }
  return message
}

/** Cuts a byte stream into the bodies of its frames; holds at most one incomplete frame and the last piece. */
export class FrameBuffer {
  #pieces = new Uint8Array(0)

  /** @param {Uint8Array} piece @returns {Uint8Array[]} what is complete now. Throws on a frame that is too large. */
  feed (piece) {
    let data = piece
    if (this.#pieces.length > 0) {
      data = new Uint8Array(this.#pieces.length + piece.length)
      data.set(this.#pieces)
      data.set(piece, this.#pieces.length)
    }
    const view = new DataView(data.buffer, data.byteOffset, data.byteLength)
    const frames = []
    let at = 0
    while (data.length - at >= LENGTH_BYTES) {
      const size = view.getUint32(at)
      if (size > MAX_FRAME_BYTES) throw new RangeError(`a frame of ${size} bytes`)
      if (data.length - at - LENGTH_BYTES < size) break
      frames.push(data.slice(at + LENGTH_BYTES, at + LENGTH_BYTES + size))
      at += LENGTH_BYTES + size
    }
    this.#pieces = data.slice(at)
    return frames
  }
}

/** One kept stream: opened by `openLink`, or by the peer. */
export class RpcLink {
  #stream
  #greeting
  #frames = new FrameBuffer()
  #calls = new Map()
  #pings = new Map()
  #nextNumber = 0
  #watch
  #heardAt = performance.now()
  #writing = Promise.resolve()

  /** What the peer said of itself: `name`, `version`, `roles`, `addresses`; null until it did. */
  hello = null

  /** Why the link ended; null while it is up. @type {LinkLost | null} */
  lost = null

  /** Called with (method, body bytes) of each notice. It must not throw. */
  onNotice = (/** @type {string} */ _method, /** @type {Uint8Array} */ _body) => {}

  /** Called once, when the link ends. */
  onLost = (/** @type {LinkLost} */ _error) => {}

  /** @param stream of js-libp2p @param {() => object} greeting what we say of ourselves */
  constructor (stream, greeting) {
    this.#stream = stream
    this.#greeting = greeting
    stream.addEventListener('message', event => this.#receive(event.data.subarray()))
    stream.addEventListener('remoteCloseWrite', () => this.close('the peer closed the link'))
    stream.addEventListener('close', event => this.close(event.error?.message ?? 'the stream was closed'))
    this.#watch = setInterval(() => {
      if (performance.now() - this.#heardAt > DEAD_AFTER_MS) this.close('the peer went silent')
    }, 1000)
    this.#watch.unref?.()
  }

  /**
   * Call `method` and wait for its answer's bytes.
   * Throws CallFailed and LinkLost; when `signal` aborts, the peer is told and the signal's reason is thrown.
   * @param {string} method @param {Uint8Array} body @param {{ deadlineMs?: number, signal?: AbortSignal }} [options]
   * @returns {Promise<Uint8Array>}
   */
  async call (method, body, { deadlineMs = 10_000, signal } = {}) {
    signal?.throwIfAborted()
    if (this.lost) throw this.lost
    if (this.#calls.size >= MAX_OPEN_CALLS) throw new CallFailed('busy', `${MAX_OPEN_CALLS} calls are open`)
    const call = this.#nextNumber++
    const { promise, resolve, reject } = Promise.withResolvers()
    this.#calls.set(call, { resolve, reject })
    const giveUp = error => {
      if (!this.#calls.delete(call)) return
      if (!this.lost) this.#send({ type: 'c', call })
      reject(error)
    }
    const timer = setTimeout(() => giveUp(new CallFailed('deadline', `no answer to ${method} in ${deadlineMs} ms`)), deadlineMs)
    const onAbort = () => giveUp(signal.reason)
    signal?.addEventListener('abort', onAbort, { once: true })
    this.#send({ type: 'q', call, method, deadline_ms: deadlineMs, body })
    try {
      return await promise
    } finally {
      clearTimeout(timer)
      signal?.removeEventListener('abort', onAbort)
    }
  }

  /** Tell the peer something that has no answer. Throws LinkLost. @param {string} method @param {Uint8Array} body */
  notify (method, body) {
    if (this.lost) throw this.lost
    this.#send({ type: 'n', method, body })
  }

  /** One round trip on this very stream, in milliseconds. Throws LinkLost. @returns {Promise<number>} */
  async ping () {
    if (this.lost) throw this.lost
    const number = this.#nextNumber++
    const { promise, resolve, reject } = Promise.withResolvers()
    this.#pings.set(number, { resolve, reject, sentAt: performance.now() })
    this.#send({ type: 'p', number })
    return await promise
  }

  /** End the link. Open calls fail. @param {string} [reason] */
  close (reason = 'closed here') {
    if (this.lost) return
    const error = this.lost = new LinkLost(reason)
    clearInterval(this.#watch)
    for (const { reject } of [...this.#calls.values(), ...this.#pings.values()]) reject(error)
    this.#calls.clear()
    this.#pings.clear()
    this.#stream.abort(error)
    this.onLost(error)
  }

  #send (frame) {
    const body = pack(frame)
    if (body.length > MAX_FRAME_BYTES) throw new RangeError(`a frame of ${body.length} bytes`)
    const data = new Uint8Array(LENGTH_BYTES + body.length)
    new DataView(data.buffer).setUint32(0, body.length)
    data.set(body, LENGTH_BYTES)
    // The stream's own buffer is bounded; frames wait their turn here, in order.
    this.#writing = this.#writing.then(async () => {
      if (!this.lost && !this.#stream.send(data)) await this.#stream.onDrain()
    }).catch(error => this.close(error.message))
  }

  #receive (piece) {
    if (this.lost) return
    this.#heardAt = performance.now()
    try {
      for (const body of this.#frames.feed(piece)) {
        if (!this.lost) this.#take(unpack(body))
      }
    } catch (error) {
      this.close(`the peer broke the protocol: ${error.message}`)
    }
  }

  #take (frame) {
    switch (frame.type) {
      case 'p':
        this.#send({ type: 'o', number: frame.number })
        break
      case 'o': {
        const ping = this.#pings.get(frame.number)
        if (this.#pings.delete(frame.number)) ping.resolve(performance.now() - ping.sentAt)
        break
      }
      case 'r':
      case 'x': {
        const call = this.#calls.get(frame.call)
        if (!this.#calls.delete(frame.call)) break // it was given up
        if (frame.type === 'r') call.resolve(frame.body)
        else call.reject(new CallFailed(String(frame.code), String(frame.detail)))
        break
      }
      case 'n':
        if (frame.body instanceof Uint8Array) this.onNotice(String(frame.method), frame.body)
        break
      case 'q':
        if (frame.method === 'hello' && frame.body instanceof Uint8Array) {
          this.hello = readHello(frame.body)
          this.#send({ type: 'r', call: frame.call, body: pack({ type: 'hello', ...this.#greeting() }) })
        } else {
          this.#send({ type: 'x', call: frame.call, code: 'unknown-method', detail: 'a client serves hello only' })
        }
        break
      case 'c':
        break
      default:
        throw new TypeError('a frame of unknown type')
    }
  }
}

const texts = list => Array.isArray(list) ? list.filter(text => typeof text === 'string') : []

/** What a peer says of itself. Throws LinkLost if it makes no sense. @param {Uint8Array} bytes */
function readHello (bytes) {
  let hello
  try {
    hello = unpack(bytes)
  } catch (error) {
    throw new LinkLost(`the peer broke the protocol: hello: ${error.message}`)
  }
  const { name, version, roles, addresses } = hello
  return { name: String(name ?? ''), version: String(version ?? ''), roles: texts(roles), addresses: texts(addresses) }
}

/**
 * Open the RPC stream on a connection and greet the peer. Throws CallFailed, LinkLost, and what js-libp2p throws.
 * @param connection of js-libp2p @param {() => object} greeting name, version, roles and addresses of ours
 * @param {{ signal?: AbortSignal }} [options] @returns {Promise<RpcLink>}
 */
export async function openLink (connection, greeting, { signal } = {}) {
  const stream = await connection.newStream(RPC_PROTOCOL, { signal, runOnLimitedConnection: true })
  const link = new RpcLink(stream, greeting)
  try {
    link.hello = readHello(await link.call('hello', pack({ type: 'hello', ...greeting() }), { signal }))
    return link
  } catch (error) {
    link.close('hello failed')
    throw error
  }
}

/** What `promise` gives, or the signal's reason as soon as it aborts. @param {Promise<any>} promise @param {AbortSignal} [signal] */
export function abortable (promise, signal) {
  if (signal === undefined) return promise
  return new Promise((resolve, reject) => {
    const onAbort = () => reject(signal.reason)
    if (signal.aborted) return onAbort()
    signal.addEventListener('abort', onAbort, { once: true })
    promise.then(resolve, reject).finally(() => signal.removeEventListener('abort', onAbort))
  })
}
