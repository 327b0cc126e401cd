/** A scriptable server in memory, for tests of the client and of what is built on it. */
export { FakeConnection, type Frame } from './connection.js';
export { Channel, FakeServer, type FakeServerOptions, type Session, type Stored } from './server.js';
export { FakeSocket } from './socket.js';
