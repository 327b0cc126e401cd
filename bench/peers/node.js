// The stack of the project's first plan in its plainest form: Node's cluster, ws, and pub/sub by ioredis.
// node node.js PORT WORKERS REDIS_PORT
const cluster = require('cluster')
const [port, workers, redisPort] = process.argv.slice(2).map(Number)

if (cluster.isPrimary) {
  for (let i = 0; i < workers; i++) cluster.fork()
} else {
  const { WebSocketServer } = require('ws')
  const { Redis } = require('ioredis')
  const publisher = new Redis(redisPort)
  const subscriber = new Redis(redisPort)
  const channels = new Map()
  subscriber.on('message', (channel, message) => {
    for (const socket of channels.get(channel) ?? []) socket.send(message)
  })
  const server = new WebSocketServer({ port, host: '127.0.0.1', backlog: 4096, perMessageDeflate: false })
  server.on('connection', (socket) => {
    socket.on('message', (text) => {
      const { type, channel, data } = JSON.parse(text)
      if (type === 'subscribe') {
        if (!channels.has(channel)) {
          channels.set(channel, new Set())
          subscriber.subscribe(channel)
        }
        channels.get(channel).add(socket)
        socket.send('{"type":"ack"}')
      } else {
        publisher.publish(channel, JSON.stringify({ type: 'message', channel, data, timestamp: Date.now() }))
      }
    })
    socket.on('close', () => {
      for (const sockets of channels.values()) sockets.delete(socket)
    })
  })
}
