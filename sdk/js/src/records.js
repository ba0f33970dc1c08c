/**
 * Signed records. A record is an envelope (issuer, kind, sequence, expiry, body, signature) round a body with
 * namespace, name and value; its key is the hash of the two names. In the namespace "peer" only the peer of that name
 * writes; in all others each issuer has a record of its own.
 */
import { publicKeyFromRaw } from '@libp2p/crypto/keys'
import { peerIdFromPublicKey } from '@libp2p/peer-id'

import { keyOfRecord } from './keys.js'
import { pack, unpack } from './rpc.js'

export const MAX_VALUE_BYTES = 4096
export const MAX_NAMESPACE_CHARS = 32
export const MAX_NAME_CHARS = 128
export const MAX_TTL_HOURS = 48

const KIND = 'dht-record'
const PUBLIC_KEY_BYTES = 32
const SIGNATURE_BYTES = 64
/** Clocks differ; a record is accepted so long past its expiry. */
const CLOCK_TOLERANCE_NS = 30_000_000_000n
const MAX_I64 = (1n << 63n) - 1n

const encoder = new TextEncoder()
const nowNs = () => BigInt(Date.now()) * 1_000_000n

/**
 * @typedef {object} DhtRecord
 * @property {string} issuer peer id of who signed it
 * @property {string} namespace
 * @property {string} name
 * @property {Uint8Array} value
 * @property {bigint} sequence of one issuer's records at a key, the highest stands
 * @property {bigint} expiresUnixNs
 */

function signedBytes (issuer, kind, sequence, expires, body) {
  const domain = encoder.encode('archipelag-envelope-1\0')
  const name = encoder.encode(kind)
  const data = new Uint8Array(domain.length + 2 + name.length + issuer.length + 20 + body.length)
  const view = new DataView(data.buffer)
  let at = 0
  const put = bytes => { data.set(bytes, at); at += bytes.length }
  put(domain)
  view.setUint16(at, name.length)
  at += 2
  put(name)
  put(issuer)
  view.setBigUint64(at, sequence)
  view.setBigUint64(at + 8, expires)
  view.setUint32(at + 16, body.length)
  at += 20
  put(body)
  return data
}

/**
 * A record signed with this key, as it travels. Throws if a bound is exceeded or the key may not write there.
 * @param privateKey of js-libp2p, Ed25519
 * @param {{ namespace: string, name: string, value: Uint8Array, ttlHours?: number }} record
 */
export async function sealRecord (privateKey, { namespace, name, value, ttlHours = 24 }) {
  if (!namespace || namespace.length > MAX_NAMESPACE_CHARS || !name || name.length > MAX_NAME_CHARS) {
    throw new RangeError('the namespace or the name is empty or too long')
  }
  if (value.length > MAX_VALUE_BYTES) throw new RangeError(`a value has at most ${MAX_VALUE_BYTES} bytes, not ${value.length}`)
  if (!(ttlHours > 0 && ttlHours <= MAX_TTL_HOURS)) throw new RangeError(`a record holds at most ${MAX_TTL_HOURS} hours`)
  if (namespace === 'peer' && name !== peerIdFromPublicKey(privateKey.publicKey).toString()) {
    throw new RangeError('in the namespace "peer" a peer writes only under its own name')
  }
  const sequence = nowNs()
  const expires = sequence + BigInt(Math.round(ttlHours * 3600)) * 1_000_000_000n
  const body = pack({ type: KIND, namespace, name, value })
  const issuer = privateKey.publicKey.raw
  const signature = await privateKey.sign(signedBytes(issuer, KIND, sequence, expires, body))
  return [issuer, KIND, sequence, expires, body, signature]
}

/**
 * What a record from a peer says. Throws if it is none, is not for this key, or was not signed by who may write there.
 * @param {unknown} record @param {Uint8Array} key @returns {Promise<DhtRecord>}
 */
export async function openRecord (record, key) {
  if (!Array.isArray(record) || record.length < 6) throw new TypeError('no record')
  const [issuer, kind, sequenceRaw, expiresRaw, body, signature] = record
  if (kind !== KIND || !(issuer instanceof Uint8Array) || issuer.length !== PUBLIC_KEY_BYTES) throw new TypeError('no record')
  if (!(signature instanceof Uint8Array) || signature.length !== SIGNATURE_BYTES || !(body instanceof Uint8Array)) {
    throw new TypeError('no record')
  }
  const sequence = BigInt(sequenceRaw)
  const expires = BigInt(expiresRaw)
  if (sequence < 0n || sequence > MAX_I64 || expires < 0n || expires > MAX_I64) throw new RangeError('out of range')
  if (nowNs() > expires + CLOCK_TOLERANCE_NS) throw new Error('the record has expired')
  const publicKey = publicKeyFromRaw(issuer)
  if (!await publicKey.verify(signedBytes(issuer, kind, sequence, expires, body), signature)) {
    throw new Error('the signature does not match')
  }
  const { type, namespace, name, value } = unpack(body)
  if (type !== KIND || typeof namespace !== 'string' || typeof name !== 'string' || !(value instanceof Uint8Array)) {
    throw new TypeError('no record')
  }
  if (value.length > MAX_VALUE_BYTES) throw new RangeError('the value is too large')
  const peer = peerIdFromPublicKey(publicKey).toString()
  if (namespace === 'peer' && name !== peer) throw new Error('only the peer itself writes in the namespace "peer"')
  const own = keyOfRecord(namespace, name)
  if (!own.every((byte, i) => byte === key[i])) throw new Error('the record belongs elsewhere')
  return { issuer: peer, namespace, name, value, sequence, expiresUnixNs: expires }
}
