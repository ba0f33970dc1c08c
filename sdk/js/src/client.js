/** A peer that dials Islands, gateways and other peers of the network, and asks. */
import { circuitRelayTransport } from '@libp2p/circuit-relay-v2'
import { generateKeyPair, generateKeyPairFromSeed } from '@libp2p/crypto/keys'
import { identify } from '@libp2p/identify'
import { noise } from '@libp2p/noise'
import { peerIdFromString } from '@libp2p/peer-id'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { yamux } from '@libp2p/yamux'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'

import { scopeOfRemote } from './addresses.js'
import { Dht } from './dht.js'
import { keyOfName, keyOfRecord } from './keys.js'
import { sealRecord } from './records.js'
import { abortable, openLink, pack, RPC_PROTOCOL, RpcLink, unpack } from './rpc.js'

export const VERSION = '0.1.0'

/** Links kept at once; beyond it the one unused for longest is closed. */
const MAX_LINKS = 64
/** Peers whose addresses are remembered. */
const MAX_MET = 1000
/** Dialling, the RPC stream and hello together. */
const CONNECT_MS = 10_000
/** Closing may take so long; what is open then goes with the process. */
const CLOSE_MS = 5_000

/**
 * Start a client.
 * @param {object} [options]
 * @param {string} [options.name] how peers show it to people
 * @param {Uint8Array} [options.seed] 32 bytes of an Ed25519 key; without it the client is somebody new each time
 * @param {string[]} [options.listen] multiaddrs to listen on, if others are to dial it (it stays a client of the DHT)
 * @returns {Promise<Client>}
 */
export async function openClient ({ name = 'js-client', seed, listen = [] } = {}) {
  const privateKey = seed === undefined ? await generateKeyPair('Ed25519') : await generateKeyPairFromSeed('Ed25519', seed)
  const libp2p = await createLibp2p({
    privateKey,
    nodeInfo: { name: 'archipelag-js', version: VERSION, userAgent: `archipelag-js/${VERSION}` },
    addresses: { listen },
    transports: [tcp(), circuitRelayTransport()], // the second dials by relays
    connectionEncrypters: [noise()],
    streamMuxers: [yamux()],
    services: { identify: identify(), ping: ping() },
    // What may be dialled is decided where addresses are learnt (addresses.js).
    connectionGater: { denyDialMultiaddr: () => false },
    // Links have heartbeats of their own.
    connectionMonitor: { enabled: false }
  })
  return new Client(libp2p, privateKey, name)
}

/** Made by `openClient`. */
export class Client {
  #privateKey
  #name
  #dht
  #links = new Map() // by peer, used longest ago first
  #met = new Map() // addresses that worked, by peer, for when a link has ended

  constructor (libp2p, privateKey, name) {
    /** The js-libp2p node, for protocols of one's own. */
    this.libp2p = libp2p
    /** Our own peer id. @type {string} */
    this.peer = libp2p.peerId.toString()
    this.#privateKey = privateKey
    this.#name = name
    this.#dht = new Dht((contact, signal) => this.#reach(contact, signal), () => this.#contacts())
    libp2p.handle(RPC_PROTOCOL, (stream, connection) => {
      this.#adopt(connection.remotePeer.toString(), new RpcLink(stream, () => this.#greeting()))
      this.#closeIdle()
    }, { maxInboundStreams: 2, runOnLimitedConnection: true })
  }

  /** Addresses at which this client listens, with its peer id. @returns {string[]} */
  get addresses () {
    return this.libp2p.getMultiaddrs().map(String)
  }

  /** Peers to which there is a link. @returns {string[]} */
  get peers () {
    return this.#contacts().map(contact => contact.peer)
  }

  /**
   * Connect to the peer at this address (with /p2p/ID) and greet it. Throws if it can not be reached.
   * @param {string} address @param {{ signal?: AbortSignal }} [options]
   * @returns {Promise<{ peer: string, name: string, version: string, roles: string[] }>} what it says of itself
   */
  async connect (address, { signal } = {}) {
    const peer = /\/p2p\/([^/]+)$/.exec(address)?.[1]
    if (peer === undefined) throw new TypeError(`${JSON.stringify(address)} does not say whom to expect: add /p2p/PEER`)
    const { link } = await this.#reach({ peer, addresses: [address] }, signal)
    const { name, version, roles } = link.hello
    return { peer, name, version, roles }
  }

  /** A round trip to a connected peer by libp2p's ping, in milliseconds. @param {string} peer @param {{ signal?: AbortSignal }} [options] */
  async ping (peer, options = {}) {
    return await this.libp2p.services.ping.ping(peerIdFromString(peer), options)
  }

  /**
   * What a connected peer says by libp2p's identify.
   * @param {string} peer @param {{ signal?: AbortSignal }} [options]
   * @returns {Promise<{ peer: string, agent: string, protocols: string[], addresses: string[], observed: string | null }>}
   */
  async identify (peer, options = {}) {
    const [connection] = this.libp2p.getConnections(peerIdFromString(peer))
    if (connection === undefined) throw new Error('not connected')
    const found = await this.libp2p.services.identify.identify(connection, options)
    return {
      peer: found.peerId.toString(),
      agent: found.agentVersion ?? '',
      protocols: found.protocols,
      addresses: found.listenAddrs.map(String),
      observed: found.observedAddr?.toString() ?? null
    }
  }

  /** A round trip on the RPC link to a connected peer, in milliseconds. @param {string} peer */
  async pingLink (peer) {
    const { link } = await this.#reach({ peer, addresses: [] })
    return await link.ping()
  }

  /**
   * Call a method of a connected peer. Throws CallFailed, LinkLost.
   * @param {string} peer @param {string} method @param {{ type: string }} message what the method takes
   * @param {{ deadlineMs?: number, signal?: AbortSignal }} [options] @returns {Promise<object>} its answer
   */
  async call (peer, method, message, options = {}) {
    const { link } = await this.#reach({ peer, addresses: [] }, options.signal)
    return unpack(await link.call(method, pack(message), options))
  }

  /**
   * The live peers closest to a key, nearest first.
   * @param {string | Uint8Array} name see `keyOfName` @param {{ signal?: AbortSignal }} [options]
   */
  async findNode (name, options = {}) {
    return await this.#dht.closest(keyOfName(name), options)
  }

  /**
   * The newest record of each issuer at a name; signatures and owners are checked.
   * @param {string} namespace @param {string} name @param {{ quorum?: number, signal?: AbortSignal }} [options]
   */
  async getRecords (namespace, name, options = {}) {
    return await this.#dht.records(keyOfRecord(namespace, name), options)
  }

  /**
   * Sign a record and leave it with the closest peers. It is not repeated: it stays until it expires or its holders go.
   * @param {string} namespace @param {string} name @param {Uint8Array} value
   * @param {{ ttlHours?: number, signal?: AbortSignal }} [options] @returns {Promise<{ copies: number }>}
   */
  async putRecord (namespace, name, value, { ttlHours, signal } = {}) {
    const record = await sealRecord(this.#privateKey, { namespace, name, value, ttlHours })
    return await this.#dht.store(keyOfRecord(namespace, name), { type: 'put', r: record }, { signal })
  }

  /**
   * Peers that say they provide a key.
   * @param {string | Uint8Array} name see `keyOfName` @param {{ wanted?: number, signal?: AbortSignal }} [options]
   */
  async findProviders (name, options = {}) {
    return await this.#dht.providers(keyOfName(name), options)
  }

  /**
   * Tell the closest peers that this client provides a key. Others can use that only if the client listens.
   * @param {string | Uint8Array} name see `keyOfName` @param {{ signal?: AbortSignal }} [options]
   */
  async provide (name, options = {}) {
    const key = keyOfName(name)
    return await this.#dht.store(key, { type: 'provide', k: key }, options)
  }

  /** Close all links and stop. */
  async close () {
    for (const { link } of this.#links.values()) link?.close()
    this.#links.clear()
    let timer
    const late = new Promise(resolve => { timer = setTimeout(resolve, CLOSE_MS) })
    await Promise.race([this.libp2p.stop(), late]) // it can wait for ever for a connection that was being made
    clearTimeout(timer)
  }

  #greeting () {
    return { name: this.#name, version: VERSION, roles: [], addresses: this.addresses.slice(0, 16) }
  }

  #contacts () {
    return [...this.#links].filter(([, entry]) => entry.link !== null).map(([peer, { addresses }]) => ({ peer, addresses }))
  }

  /** A link to a peer: the one there is, or a new one by its addresses. */
  async #reach ({ peer, addresses }, signal) {
    if (peer === this.peer) throw new Error('that is this client itself')
    let entry = this.#links.get(peer)
    if (entry === undefined) {
      entry = { link: null, addresses, opening: null }
      entry.opening = this.#open(peer, addresses, entry)
      entry.opening.catch(() => { if (this.#links.get(peer) === entry) this.#links.delete(peer) })
    }
    this.#links.delete(peer)
    this.#links.set(peer, entry) // used last
    this.#closeIdle()
    const link = entry.link ?? await abortable(entry.opening, signal)
    const [connection] = this.libp2p.getConnections(peerIdFromString(peer))
    return { link, scope: scopeOfRemote(connection?.remoteAddr ?? '') }
  }

  async #open (peer, addresses, entry) {
    const signal = AbortSignal.timeout(CONNECT_MS)
    let [connection] = this.libp2p.getConnections(peerIdFromString(peer))
    if (connection === undefined) {
      const known = addresses.length > 0 ? addresses : this.#met.get(peer) ?? []
      if (known.length === 0) throw new Error(`no address of ${peer} is known`)
      connection = await this.libp2p.dial(known.map(address => multiaddr(address)), { signal })
      this.#met.set(peer, known)
      if (this.#met.size > MAX_MET) this.#met.delete(this.#met.keys().next().value)
    }
    const link = await openLink(connection, () => this.#greeting(), { signal })
    this.#adopt(peer, link, entry)
    return link
  }

  #adopt (peer, link, entry = { link, addresses: [], opening: null }) {
    const before = this.#links.get(peer)
    entry.link = link
    link.onNotice = (method, body) => this.#dht.take(peer, method, body)
    link.onLost = error => {
      if (this.#links.get(peer)?.link === link) {
        this.#links.delete(peer)
        this.#dht.lost(peer, error)
      }
    }
    this.#links.set(peer, entry)
    if (before?.link && before.link !== link) before.link.close('replaced by a newer link')
  }

  #closeIdle () {
    for (const [peer, { link }] of this.#links) {
      if (this.#links.size <= MAX_LINKS) return
      if (link === null) continue // being opened
      this.#links.delete(peer)
      this.#dht.lost(peer, new Error('closed for others'))
      link.close('unused for longest')
      this.libp2p.hangUp(peerIdFromString(peer)).catch(() => {})
    }
  }
}
