export * from './client/index.js';
export { BroadcastProvider, type BroadcastProviderProps } from './react/provider.js';
export { type Broadcast, useBroadcast } from './react/use-broadcast.js';
export { type BroadcastSocket, useBroadcastSocket } from './react/use-broadcast-socket.js';
export { type Subscription, type UseSubscriptionOptions, useSubscription } from './react/use-subscription.js';
