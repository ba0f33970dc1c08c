// A js-libp2p peer for the tests. Arguments: relay | listen RELAY | dial ADDRESS.
// Prints its addresses as JSON; `dial` then prints what came back from /echo/1.

import { circuitRelayServer, circuitRelayTransport } from '@libp2p/circuit-relay-v2'
import { identify } from '@libp2p/identify'
import { noise } from '@libp2p/noise'
import { tcp } from '@libp2p/tcp'
import { yamux } from '@libp2p/yamux'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'

const [role, address] = process.argv.slice(2)
const onLimited = { runOnLimitedConnection: true }

const node = await createLibp2p({
  addresses: { listen: [role === 'listen' ? `${address}/p2p-circuit` : '/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp(), circuitRelayTransport()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  connectionGater: { denyDialMultiaddr: () => false }, // loopback is dialled, too
  services: role === 'relay' ? { identify: identify(), relay: circuitRelayServer() } : { identify: identify() }
})

await node.handle('/echo/1', (stream) => {
  stream.addEventListener('message', (event) => stream.send(event.data))
}, onLimited)

while (node.getMultiaddrs().length === 0) {
  await new Promise((resolve) => node.addEventListener('self:peer:update', resolve, { once: true }))
}
console.log(JSON.stringify(node.getMultiaddrs().map(String)))

if (role === 'dial') {
  const connection = await node.dial(multiaddr(address))
  const stream = await connection.newStream('/echo/1', onLimited)
  stream.addEventListener('message', (event) => {
    console.log(JSON.stringify({
      got: new TextDecoder().decode(event.data.subarray()),
      via: connection.remoteAddr.toString(),
      limits: { bytes: Number(connection.limits.bytes), seconds: connection.limits.seconds }
    }))
  })
  stream.send(new TextEncoder().encode('from JavaScript'))
}
