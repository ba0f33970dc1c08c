import { openClient } from 'archipelag-client'

const client = await openClient({ name: 'readme' })
try {
  const node = await client.connect(process.argv[2])
  console.log(`met ${node.name} (${node.roles}), ${await client.ping(node.peer)} ms away`)

  const { copies } = await client.putRecord('notes', 'greeting', new TextEncoder().encode('hello'))
  console.log(`a record lies at ${copies} peers`)

  const { records } = await client.getRecords('notes', 'greeting')
  for (const { issuer, value } of records) console.log(`${issuer} says: ${new TextDecoder().decode(value)}`)

  const { providers } = await client.findProviders('role:coordinator')
  console.log(`${providers.length} coordinators`)
} finally {
  await client.close()
}
