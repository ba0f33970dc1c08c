// Calls the client as test_js_client.py says: one JSON order a line in, one JSON answer a line out.
import { createInterface } from 'node:readline'

import { openClient } from 'archipelag-client'

const clients = []
const text = bytes => new TextDecoder().decode(bytes)

const orders = {
  open: async options => {
    const seed = options.seed && Uint8Array.from(Buffer.from(options.seed, 'hex'))
    clients.push(await openClient({ ...options, seed }))
    return { peer: clients.at(-1).peer, addresses: clients.at(-1).addresses }
  },
  close: async () => await Promise.all(clients.splice(0).map(client => client.close()))
}

async function obey ({ order, client = 0, args = [] }) {
  if (orders[order]) return await orders[order](...args) ?? null
  if (order === 'putRecord') args[2] = new TextEncoder().encode(args[2])
  if (order === 'peers') return clients[client].peers
  if (order === 'me') return { peer: clients[client].peer }
  const options = args.at(-1)
  if (options?.abortAfterMs) options.signal = AbortSignal.timeout(options.abortAfterMs)
  const found = await clients[client][order](...args) ?? null
  if (order === 'getRecords') found.records = found.records.map(({ issuer, value }) => ({ issuer, value: text(value) }))
  return found
}

for await (const line of createInterface({ input: process.stdin })) {
  const order = JSON.parse(line)
  obey(order).then(
    result => ({ id: order.id, result }),
    error => ({ id: order.id, error: `${error.name}: ${error.message}` })
  ).then(answer => console.log(JSON.stringify(answer)))
}
await orders.close()
