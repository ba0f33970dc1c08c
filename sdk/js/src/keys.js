/** Places in the key space: SHA-256 of what they name, 32 bytes. Each kind of name has its own prefix. */
import { sha256 } from '@noble/hashes/sha2.js'
import { peerIdFromString } from '@libp2p/peer-id'

export const KEY_BYTES = 32

const encoder = new TextEncoder()

const hash = (...texts) => sha256(encoder.encode(texts.join('')))

/** Where a peer stands. @param {string} peer its base58 id */
export const keyOfPeer = peer => hash(peer)

/** Where a record lies. @param {string} namespace @param {string} name */
export const keyOfRecord = (namespace, name) => hash('archipelag-dht-record\0', namespace, '\0', name)

/** Where the providers of a Cargo are told. @param {string} digest sha256:… */
export const keyOfCargo = digest => hash('archipelag-dht-cargo\0', digest)

/** Where peers with a role are told. @param {string} role @param {string} [region] */
export const keyOfRole = (role, region = '') => hash('archipelag-dht-role\0', role, '\0', region)

/** Where peers that can do something are told. @param {string} capability @param {string} [region] */
export const keyOfCapability = (capability, region = '') => hash('archipelag-dht-capability\0', capability, '\0', region)

/** Where the peers of a region are told. @param {string} region */
export const keyOfRegion = region => hash('archipelag-dht-region\0', region)

/**
 * The key of a name as people write it: a peer id, sha256:DIGEST of a Cargo, role:NAME[@REGION],
 * capability:NAME[@REGION], region:NAME, or 64 hexadecimal digits. A key is returned as it is.
 * @param {string | Uint8Array} name @returns {Uint8Array}
 */
export function keyOfName (name) {
  if (name instanceof Uint8Array) {
    if (name.length !== KEY_BYTES) throw new RangeError(`a key has ${KEY_BYTES} bytes, not ${name.length}`)
    return name
  }
  if (/^[0-9a-f]{64}$/i.test(name)) return Uint8Array.from(name.match(/../g), pair => parseInt(pair, 16))
  if (/^sha256:[0-9a-f]{64}$/.test(name)) return keyOfCargo(name)
  const [, kind, what, region] = /^(role|capability|region):([^@]+)(?:@(.*))?$/.exec(name) ?? []
  if (kind === 'role') return keyOfRole(what, region)
  if (kind === 'capability') return keyOfCapability(what, region)
  if (kind === 'region' && region === undefined) return keyOfRegion(what)
  if (isPeer(name)) return keyOfPeer(name)
  throw new TypeError(`${JSON.stringify(name)} names no key`)
}

/** Is this the id of a peer with an Ed25519 key, as all peers of this network have? @param {string} text */
export function isPeer (text) {
  try {
    return peerIdFromString(text).type === 'Ed25519' && peerIdFromString(text).toString() === text
  } catch {
    return false
  }
}

/** @param {Uint8Array} a @param {Uint8Array} b @returns {bigint} the XOR metric */
export function distance (a, b) {
  let found = 0n
  for (let i = 0; i < KEY_BYTES; i++) found = found << 8n | BigInt(a[i] ^ b[i])
  return found
}
