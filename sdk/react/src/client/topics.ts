/** All channels of a client, and what a connection brings and takes. */
import type { Message, SubscribeOptions } from '../types.js';
import type { BroadcastError } from './errors.js';
import { createTopic, type Surroundings, type Topic } from './topic.js';
import type { ConnectAck, ErrorFrame } from './wire.js';

export const createTopics = (surroundings: Omit<Surroundings, 'released'>) => {
  const topics = new Map<string, Topic>();
  let isClosed = false;
  let reason: BroadcastError | undefined;

  const released = (channel: string) => topics.delete(channel);

  const open = (channel: string) => {
    const topic = topics.get(channel) ?? createTopic(channel, { ...surroundings, released });
    topics.set(channel, topic);
    return topic;
  };

  return {
    subscribe(channel: string, options: SubscribeOptions) {
      const topic = open(channel);
      const undo = topic.add(options);
      if (isClosed) topic.end(reason);
      return undo;
    },

    receive: (message: Message) => topics.get(message.channel!)?.receive(message),

    /** An error about a channel that nobody has asked for: a loss, or the end of the subscription. */
    refused(frame: ErrorFrame) {
      const topic = topics.get(frame.channel!);
      if (frame.code === 'history_lost') topic?.lost(frame);
      else topic?.refused(frame);
      return !!topic;
    },

    up({ subscriptions }: ConnectAck) {
      const restored = new Map(subscriptions.map((one) => [one.channel, one]));
      for (const channel of restored.keys()) topics.get(channel)?.tellDone();
      surroundings.acks.flush();
      for (const channel of new Set([...topics.keys(), ...restored.keys()]))
        open(channel).up(restored.get(channel));
    },

    down() {
      surroundings.acks.clear();
      for (const topic of topics.values()) topic.down();
    },

    open() {
      isClosed = false;
    },

    close(error?: BroadcastError) {
      isClosed = true;
      reason = error;
      for (const topic of topics.values()) topic.end(error);
    },

    /** What was forbidden may be allowed now. */
    retry() {
      for (const topic of topics.values()) topic.retry();
    },
  };
};
