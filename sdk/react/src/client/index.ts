export type * from '../types.js';
export { BroadcastClient } from './client.js';
export { BroadcastError } from './errors.js';
