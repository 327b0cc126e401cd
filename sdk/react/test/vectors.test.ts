/** The wire examples that the server's tests read too: tests/vectors/*.json of the repository. */
import { readFileSync } from 'node:fs';
import { describe, expect, test } from 'vitest';
import { connected, listen, pass } from './kit.js';

const read = (name: string) =>
  JSON.parse(readFileSync(new URL(`../../../tests/vectors/${name}.json`, import.meta.url), 'utf8'));

interface ClientFrame {
  name: string;
  frame?: Record<string, unknown>;
  command?: Record<string, unknown>;
}

interface ServerFrame {
  name: string;
  frame: { type: string; op?: string; channel?: string; messageId?: string; [field: string]: unknown };
}

interface CloseCode {
  code: number;
  name: string;
  then: 'backoff' | 'fresh token' | 'stop';
  retryAfter?: boolean;
  without?: 'session' | 'message';
}

describe('what the server sends', () => {
  test.each<ServerFrame>(read('server-frames').frames)('$name', async ({ frame }) => {
    const { server, client, errors, status } = await connected();
    const channel = frame.channel ?? 'other';
    const one = listen(client, channel);
    const messages: unknown[] = [];
    client.on('message', (message) => messages.push(message));
    // The place before the message, so that it is the next one.
    server.onFrame = (request, connection) => {
      if (request.type !== 'subscribe') return;
      const { seq, epoch } = frame as { seq?: number; epoch?: string };
      const position = frame.type === 'message' && epoch ? { persistent: true, epoch, seq: seq! - 1 } : {};
      connection.send({
        type: 'ack',
        op: 'subscribe',
        messageId: request.messageId,
        channel,
        persistent: false,
        ...position,
      });
      return false;
    };
    await pass();

    if (frame.type === 'message') {
      server.connection.send(frame);
      await pass();
      const { type: _, ...message } = frame;
      expect(messages).toEqual([message]);
      expect(one.messages).toEqual(frame.channel === undefined ? [] : [message]);
    } else if (frame.type === 'ping') {
      server.connection.send(frame);
      await pass();
      expect(server.connection.received.at(-1)).toEqual({ type: 'pong' });
    } else if (frame.op === 'connect') {
      server.connection.drop();
      server.onConnect = (connection) => {
        connection.session = server.makeSession();
        connection.send(frame);
        return false;
      };
      await pass(500);
      expect(status()).toBe('open');
      expect(client.getSnapshot().clientId).toBe(frame.clientId);
    } else if (frame.op === 'broadcast') {
      server.onFrame = () => false;
      const published = client.publish(channel, 1, { id: frame.messageId! });
      await pass();
      server.connection.send(frame);
      const { messageId, seq, epoch, duplicate } = frame;
      expect(await published).toEqual({ messageId, seq, epoch, duplicate });
    } else if (frame.type === 'error' && frame.messageId !== undefined && !frame.retryAfter) {
      server.onFrame = () => false;
      const published = client.publish(channel, 1, { id: frame.messageId });
      const outcome = expect(published).rejects.toMatchObject({ code: frame.code, message: frame.message });
      await pass();
      server.connection.send(frame);
      await outcome;
    } else if (frame.type === 'error' && frame.retryAfter) {
      server.onFrame = () => false;
      void client.publish(channel, 1, { id: frame.messageId! });
      await pass();
      server.connection.send(frame);
      await pass();
      server.onFrame = undefined;
      await pass(frame.retryAfter as number);
      expect(server.connection.receivedOf('broadcast').map(({ messageId }) => messageId)).toEqual([
        frame.messageId,
        frame.messageId,
      ]);
    } else if (frame.code === 'history_lost') {
      server.connection.send(frame);
      await pass();
      expect(one.heard).toEqual(['gap']);
    } else {
      // Answers to nothing: they change nothing, and an error is told.
      server.connection.send(frame);
      await pass();
      expect(status()).toBe('open');
      expect(errors).toEqual(frame.type === 'error' ? [frame.code] : []);
    }
  });
});

describe('what the client sends is among what the server understands', () => {
  const known = (read('client-frames').frames as ClientFrame[])
    .filter(({ command }) => command)
    .map(({ frame }) => frame ?? {});
  const shape = (frame: object) => Object.keys(frame).sort().join(' ');
  const fields = (type: string) =>
    new Set(known.filter((frame) => frame.type === type).flatMap((frame) => Object.keys(frame)));

  test('frames of every type', async () => {
    const { server, client } = await connected({ getToken: () => 'a.b.c' }, { expiresIn: 10_000 });
    const { off } = listen(client, 'p.orders', { since: { epoch: 'e1', seq: 0 } });
    listen(client, 'p.other', { last: 3 });
    await pass();
    await client.publish('p.orders', 1);
    await client.publish(null, 1);
    off();
    await pass(25_000);
    const types = new Set(server.connection.received.map(({ type }) => type));
    expect(types).toEqual(new Set(['subscribe', 'unsubscribe', 'broadcast', 'ack', 'pong', 'auth']));
    for (const frame of server.connection.received) {
      const extra = Object.keys(frame).filter((name) => !fields(frame.type).has(name));
      expect(extra, shape(frame)).toEqual([]);
    }
  });
});

describe('close codes', () => {
  test.each<CloseCode>(read('close-codes').codes)(
    '$code $name',
    async ({ code, then, retryAfter, without }) => {
      const { server, client, status } = await connected({ getToken: () => 'token' });
      server.onFrame = () => false;
      const fate = client.publish('news', 1).then(
        () => 'taken',
        (error) => error.code,
      );
      await pass();
      server.onFrame = undefined;
      server.connection.close(code, retryAfter ? { retryAfter: 4_000 } : '');
      await pass();
      expect(status()).toBe(then === 'stop' ? 'closed' : then === 'backoff' ? 'reconnecting' : 'open');
      if (retryAfter) await pass(3_999);
      if (retryAfter) expect(status()).toBe('reconnecting');
      await pass(500);
      expect(status()).toBe(then === 'stop' ? 'closed' : 'open');
      if (then === 'stop') return;
      const resumes = server.connection.protocols.some((one) => one.startsWith('session.'));
      expect(resumes).toBe(without !== 'session');
      expect(await fate).toBe(without === 'message' ? 'too_large' : 'taken');
    },
  );
});
