/**
 * Look-ups in the distributed hash table, as a client: it asks, but says of itself in every message that it stands in
 * no table and stores nothing. Messages travel as notices of the method "dht" on RPC links; each carries the asker's
 * number (`c`), the sender's network coordinate (`x`, `e`; ours is unknown) and whether it is a client (`u`).
 */
import { distance, isPeer, keyOfPeer } from './keys.js'
import { usableAddresses } from './addresses.js'
import { openRecord } from './records.js'
import { abortable, pack, unpack } from './rpc.js'

/** Contacts in an answer, and copies of what is stored: the network's constant. */
export const K = 20
/** Queries that a look-up has open at once. */
const ALPHA = 3
/** A look-up is done when so many of the closest peers have answered. */
const BETA = 3
/** Queries after which it ends in any case. */
const MAX_QUERIES = 100
/** Candidates that it remembers. */
const MAX_CANDIDATES = 4 * K
/** Failures of peers that one peer named, with no success among them, after which the rest of its list is dropped. */
const MAX_BAD_REFERRALS = 3
/** How long an answer may take, once there is a link. */
const ANSWER_MS = 5_000
/** What one answer may hold; more is not read. */
const MAX_CONTACTS = 64
const MAX_RECORDS = 32
/** Peers that answered and are asked first the next time. */
const MAX_REMEMBERED = 200

const METHOD = 'dht'
const TAKEN = 0

/** @typedef {{ peer: string, addresses: string[] }} Contact */

/** What a look-up took. @typedef {{ queries: number, failures: number, milliseconds: number }} Cost */

export class Dht {
  #reach
  #links
  #asked = new Map()
  #nextCall = 1
  #remembered = new Map()

  /**
   * @param {(contact: Contact, signal?: AbortSignal) => Promise<{ link: import('./rpc.js').RpcLink, scope: number }>} reach
   * gives a link to a peer, and the scope of where it leads
   * @param {() => Contact[]} links peers to which there is a link
   */
  constructor (reach, links) {
    this.#reach = reach
    this.#links = links
  }

  /** A notice came. @param {string} peer @param {string} method @param {Uint8Array} body */
  take (peer, method, body) {
    if (method !== METHOD) return
    let message
    try {
      message = unpack(body)
    } catch {
      return // whoever asked this peer will see that it does not answer
    }
    const waiting = this.#asked.get(message.c)
    if (waiting !== undefined && waiting.peer === peer) waiting.resolve(message)
  }

  /** A link is gone: what was asked over it has failed. @param {string} peer @param {Error} error */
  lost (peer, error) {
    for (const waiting of [...this.#asked.values()]) {
      if (waiting.peer === peer) waiting.reject(error)
    }
  }

  /** @param {Uint8Array} key @param {{ signal?: AbortSignal }} options */
  async closest (key, options = {}) {
    const { contacts, cost } = await this.#lookUp(key, () => ({ type: 'find', k: key }), () => false, options)
    return { contacts, cost }
  }

  /** @param {Uint8Array} key @param {{ quorum?: number, signal?: AbortSignal }} options */
  async records (key, { quorum = 1, signal } = {}) {
    const newest = new Map()
    let holders = 0
    const note = async answer => {
      const told = Array.isArray(answer.r) ? answer.r.slice(0, MAX_RECORDS) : []
      const opened = await Promise.allSettled(told.map(record => openRecord(record, key)))
      const good = opened.filter(result => result.status === 'fulfilled').map(result => result.value)
      if (good.length > 0) holders++
      for (const record of good) {
        const known = newest.get(record.issuer)
        if (known === undefined || record.sequence > known.sequence) newest.set(record.issuer, record)
      }
      return holders >= quorum
    }
    const { cost } = await this.#lookUp(key, () => ({ type: 'get', k: key }), note, { signal })
    return { records: [...newest.values()], cost }
  }

  /** @param {Uint8Array} key @param {{ wanted?: number, signal?: AbortSignal }} options */
  async providers (key, { wanted = 20, signal } = {}) {
    const found = new Map()
    const note = async (answer, scope) => {
      for (const contact of contactsOf(answer.p, scope)) {
        const known = found.get(contact.peer)
        if (known === undefined || known.addresses.length === 0) found.set(contact.peer, contact)
      }
      return found.size >= wanted
    }
    const { cost } = await this.#lookUp(key, () => ({ type: 'who', k: key }), note, { signal })
    return { providers: [...found.values()], cost }
  }

  /** Leave something with the closest peers. @param {Uint8Array} key @param {object} message @param {{ signal?: AbortSignal }} options */
  async store (key, message, options = {}) {
    const { contacts, cost } = await this.closest(key, options)
    const answers = await Promise.allSettled(contacts.map(contact => this.#ask(contact, message, 'kept', options.signal)))
    const copies = answers.filter(answer => answer.status === 'fulfilled' && answer.value.answer.o === TAKEN).length
    return { copies, cost }
  }

  /**
   * Ask the peers that are closest to `key`, and whom they name, until the closest have answered or `note` has enough.
   * What a peer says wrong counts as no answer.
   */
  async #lookUp (key, query, note, { signal } = {}) {
    const began = performance.now()
    const candidates = []
    const known = new Set()
    const cost = { queries: 0, failures: 0, milliseconds: 0 }
    const blame = new Map() // failures among those that a peer named; -1: one of them answered
    const add = (contact, referrer) => {
      if (known.has(contact.peer)) return
      known.add(contact.peer)
      candidates.push({ contact, referrer, distance: distance(keyOfPeer(contact.peer), key), state: 'waiting' })
      candidates.sort((a, b) => (a.distance < b.distance ? -1 : 1))
      if (candidates.length > MAX_CANDIDATES) {
        const last = candidates.findLastIndex(candidate => candidate.state === 'waiting')
        if (last >= 0) known.delete(candidates.splice(last, 1)[0].contact.peer)
      }
    }
    const seeds = [...this.#links(), ...this.#remembered.values()]
    if (seeds.length === 0) throw new Error('not connected to anybody: connect to a peer of the network first')
    for (const contact of seeds) add(contact, null)
    const noteFailure = candidate => {
      candidate.state = 'failed'
      cost.failures++
      this.#remembered.delete(candidate.contact.peer)
      const { referrer } = candidate
      const failures = blame.get(referrer) ?? 0
      if (referrer === null || failures < 0) return
      blame.set(referrer, failures + 1)
      if (failures + 1 < MAX_BAD_REFERRALS) return
      for (const other of candidates) {
        if (other.referrer === referrer && other.state === 'waiting') other.state = 'failed'
      }
    }
    const open = new Set()
    let enough = false
    for (;;) {
      signal?.throwIfAborted()
      const good = candidates.filter(candidate => candidate.state !== 'failed')
      const done = good.slice(0, BETA)
      if (enough || done.every(candidate => candidate.state === 'answered')) break
      const next = good.slice(0, K).find(candidate => candidate.state === 'waiting')
      if (next !== undefined && open.size < ALPHA && cost.queries < MAX_QUERIES) {
        next.state = 'open'
        cost.queries++
        const type = { find: 'nodes', get: 'records', who: 'providers' }[query().type]
        const asking = this.#ask(next.contact, query(), type, signal).then(async ({ answer, scope }) => {
          next.state = 'answered'
          blame.set(next.referrer, -1)
          this.#remember(next.contact)
          const told = contactsOf(answer.n, scope).slice(0, K).filter(contact => contact.addresses.length > 0)
          for (const contact of told) add(contact, next.contact.peer)
          if (await note(answer, scope)) enough = true
        }).catch(() => noteFailure(next)).finally(() => open.delete(asking))
        open.add(asking)
      } else if (open.size > 0) {
        await abortable(Promise.race(open), signal)
      } else {
        break
      }
    }
    cost.milliseconds = performance.now() - began
    const contacts = candidates.filter(candidate => candidate.state !== 'failed').slice(0, K).map(candidate => candidate.contact)
    return { contacts, cost }
  }

  async #ask (contact, message, expected, signal) {
    const { link, scope } = await this.#reach(contact, signal)
    const c = this.#nextCall++
    const { promise, resolve, reject } = Promise.withResolvers()
    this.#asked.set(c, { peer: contact.peer, resolve, reject })
    const timer = setTimeout(() => reject(new Error(`no answer in ${ANSWER_MS} ms`)), ANSWER_MS)
    try {
      link.notify(METHOD, pack({ ...message, c, x: 0, e: 1000, u: true }))
      const answer = await promise
      if (answer.type !== expected) throw new TypeError(`${expected} was expected, not ${answer.type}`)
      return { answer, scope }
    } finally {
      clearTimeout(timer)
      this.#asked.delete(c)
    }
  }

  #remember (contact) {
    this.#remembered.delete(contact.peer)
    this.#remembered.set(contact.peer, contact)
    if (this.#remembered.size > MAX_REMEMBERED) this.#remembered.delete(this.#remembered.keys().next().value)
  }
}

/** Contacts out of an answer: [peer, addresses, coordinate] each. What is none is left out. */
function contactsOf (told, narrowest) {
  if (!Array.isArray(told)) return []
  return told.slice(0, MAX_CONTACTS)
    .filter(contact => Array.isArray(contact) && typeof contact[0] === 'string' && isPeer(contact[0]))
    .map(([peer, addresses]) => ({ peer, addresses: usableAddresses(peer, addresses, narrowest) }))
}
