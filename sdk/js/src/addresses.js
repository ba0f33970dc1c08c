/**
 * Which addresses are believed. Who speaks to us from the world can not know what is good on our machine or in our
 * network, and must not make us knock there: an address of a narrower scope than its teller's is left out.
 */
import { multiaddr } from '@multiformats/multiaddr'

import { isPeer } from './keys.js'

export const MACHINE = 0
export const NETWORK = 1
export const WORLD = 2

const MAX_ADDRESS_CHARS = 256
/** Addresses of one contact that are kept. */
const MAX_ADDRESSES = 8

/** The scope of an IP address; null for one that means nothing to others. @param {string} ip */
export function scopeOfIp (ip) {
  const mapped = /^::ffff:(\d+\.\d+\.\d+\.\d+)$/i.exec(ip)
  const four = /^(\d+)\.(\d+)\.(\d+)\.(\d+)$/.exec(mapped ? mapped[1] : ip)
  if (four) {
    const [a, b] = four.slice(1).map(Number)
    if (a === 127) return MACHINE
    if (a === 0 || a >= 224 || (a === 169 && b === 254)) return null
    const isPrivate = a === 10 || (a === 172 && b >= 16 && b < 32) || (a === 192 && b === 168) || (a === 100 && b >= 64 && b < 128)
    return isPrivate ? NETWORK : WORLD
  }
  const text = ip.toLowerCase()
  if (text === '::1') return MACHINE
  if (text === '::' || /^ff/.test(text) || /^fe[89ab]/.test(text)) return null
  return /^f[cd]/.test(text) ? NETWORK : WORLD
}

/** A multiaddr over TCP: to the peer itself, or to the relay that carries us there. */
const FORM = /^\/ip[46]\/([^/]+)\/tcp\/([1-9]\d{0,4})(\/p2p\/([^/]+)\/p2p-circuit)?$/

/** The scope of where a connection leads. Who is behind a relay may be anywhere. @param {{ toString(): string }} address */
export function scopeOfRemote (address) {
  const [, ip, , circuit] = FORM.exec(address.toString().replace(/\/p2p\/[^/]+$/, '')) ?? []
  return (ip === undefined || circuit !== undefined ? null : scopeOfIp(ip)) ?? WORLD
}

/**
 * What can be dialled of addresses that somebody told of a peer, with /p2p/PEER at their ends.
 * @param {string} peer @param {unknown} told @param {number} narrowest @returns {string[]}
 */
export function usableAddresses (peer, told, narrowest) {
  if (!Array.isArray(told)) return []
  const found = []
  for (const text of told) {
    if (typeof text !== 'string' || text.length > MAX_ADDRESS_CHARS) continue
    const base = text.endsWith(`/p2p/${peer}`) ? text.slice(0, -`/p2p/${peer}`.length) : text
    const [, ip, , , relay] = FORM.exec(base) ?? []
    const scope = ip === undefined ? null : scopeOfIp(ip)
    if (scope === null || scope < narrowest || (relay !== undefined && (relay === peer || !isPeer(relay)))) continue
    const full = `${base}/p2p/${peer}`
    try {
      multiaddr(full)
    } catch {
      continue
    }
    if (!found.includes(full)) found.push(full)
    if (found.length === MAX_ADDRESSES) break
  }
  return found
}
