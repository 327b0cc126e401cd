import { describe, expect, test, vi } from 'vitest';
import type { TokenRequest } from '../src/client/index.js';
import { connected, pass, setUp } from './kit.js';

/** A getToken that counts: t1, t2, ... */
function tokens() {
  const requests: TokenRequest[] = [];
  const getToken = async (request: TokenRequest) => {
    requests.push(request);
    return `t${requests.length}`;
  };
  return { getToken, requests, reasons: () => requests.map(({ reason }) => reason) };
}

test('the token goes by subprotocol, and is kept', async () => {
  const { getToken, reasons } = tokens();
  const { server } = await connected({ getToken });
  expect(server.connection.protocols).toEqual(['bcast.v1', 'bearer.t1']);
  server.connection.drop();
  await pass(500);
  expect(server.connection.protocols).toEqual(['bcast.v1', 'bearer.t1', 'session.session-1']);
  expect(server.connection.socket.url).toBe('ws://fake/ws');
  expect(reasons()).toEqual(['connect']);
});

test('null: without a token, and it is asked again the next time', async () => {
  const getToken = vi.fn(() => null);
  const { server } = await connected({ getToken });
  expect(server.connection.protocols).toEqual(['bcast.v1']);
  server.connection.drop();
  await pass(500);
  expect(getToken).toHaveBeenCalledTimes(2);
});

test('reconnect() asks for a new one: somebody else may be here', async () => {
  const { getToken, reasons } = tokens();
  const { server, client } = await connected({ getToken });
  client.reconnect();
  await pass();
  expect(server.connection.token).toBe('t2');
  expect(reasons()).toEqual(['connect', 'connect']);
});

describe.each([4500, 4501])('%i', (code) => {
  test('one try with a fresh token', async () => {
    const { getToken, reasons } = tokens();
    const { server, status, errors } = await connected({ getToken });
    server.connection.close(code);
    await pass();
    expect(server.connection.token).toBe('t2');
    expect(reasons()).toEqual(['connect', 'rejected']);
    expect(status()).toBe('open');
    expect(errors).toEqual([]);
  });

  test('only one', async () => {
    const { getToken } = tokens();
    const { server, client, status, errors } = setUp({ getToken });
    server.onConnect = (connection) => connection.close(code, 'bad');
    client.connect();
    await pass(60_000);
    expect(server.sockets).toHaveLength(2);
    expect(status()).toBe('closed');
    expect(errors).toEqual(['unauthorized']);
    expect(client.getSnapshot().error?.message).toBe('bad');
  });

  test('again after a connection that lasted', async () => {
    const { getToken } = tokens();
    const { server, status } = await connected({ getToken });
    for (let index = 0; index < 3; index++) {
      await pass(10_000);
      server.connection.close(code);
      await pass();
      expect(status()).toBe('open');
    }
    server.connection.close(code);
    await pass();
    expect(status()).toBe('closed');
  });

  test('without getToken it is final', async () => {
    const { server, status } = await connected();
    server.connection.close(code);
    await pass(60_000);
    expect(status()).toBe('closed');
  });
});

describe('renewal', () => {
  test('in place, before the end', async () => {
    const { getToken, reasons } = tokens();
    const { server, errors } = await connected({ getToken }, { expiresIn: 100_000 });
    await pass(79_999);
    expect(server.connection.receivedOf('auth')).toEqual([]);
    await pass(1);
    expect(server.connection.receivedOf('auth')).toMatchObject([{ token: 't2' }]);
    await pass(80_000);
    expect(server.connection.receivedOf('auth')).toHaveLength(2);
    expect(server.sockets).toHaveLength(1);
    expect(reasons()).toEqual(['connect', 'renew', 'renew']);
    expect(errors).toEqual([]);
    // The next connection comes with the newest.
    server.connection.drop();
    await pass(500);
    expect(server.connection.token).toBe('t3');
  });

  test('counted from the time of the server', async () => {
    const { getToken } = tokens();
    const { server, client } = setUp({ getToken });
    const ahead = Date.now() + 86_400_000;
    server.onSend = (frame) => {
      if (frame.op === 'connect') Object.assign(frame, { timestamp: ahead, expiresAt: ahead + 10_000 });
    };
    client.connect();
    await pass(7_999);
    expect(server.connection.receivedOf('auth')).toHaveLength(0);
    await pass(1);
    expect(server.connection.receivedOf('auth')).toHaveLength(1);
  });

  test('is tried again in what is left', async () => {
    let isBroken = true;
    const { server } = await connected(
      {
        getToken: ({ reason }) => {
          if (reason === 'renew' && isBroken) throw new Error('offline');
          return 'token';
        },
      },
      { expiresIn: 100_000 },
    );
    await pass(90_000);
    isBroken = false;
    await pass(6_000);
    expect(server.connection.receivedOf('auth')).toHaveLength(1);
  });

  test('one that the server refuses is tried again too', async () => {
    const { getToken, requests } = tokens();
    const { server } = await connected({ getToken }, { expiresIn: 100_000 });
    server.onFrame = (frame, connection) => {
      if (frame.type !== 'auth') return;
      connection.refuse(frame, 'unauthorized');
      return false;
    };
    await pass(99_999);
    expect(requests.length).toBeGreaterThan(3);
    expect(requests.length).toBeLessThan(10);
  });

  test('a far end does not overflow a timer', async () => {
    const { getToken, requests } = tokens();
    await connected({ getToken }, { expiresIn: 90 * 86_400_000 });
    await pass(1_000_000);
    expect(requests).toHaveLength(1);
  });

  test('its signal ends with the connection', async () => {
    const signals: AbortSignal[] = [];
    const { server } = await connected(
      {
        getToken: ({ reason, signal }) => {
          signals.push(signal);
          return reason === 'renew' ? new Promise<string>(() => {}) : 'token';
        },
      },
      { expiresIn: 10_000 },
    );
    await pass(8_000);
    expect(signals[1]?.aborted).toBe(false);
    server.connection.drop();
    await pass();
    expect(signals[1]?.aborted).toBe(true);
  });

  test('after the end a new one is asked for before connecting', async () => {
    const { getToken, reasons } = tokens();
    const { server } = await connected({ getToken }, { expiresIn: 10_000 });
    server.connection.close(1012, { retryAfter: 60_000 });
    await pass(60_000);
    expect(server.connection.token).toBe('t2');
    expect(reasons()).toEqual(['connect', 'renew']);
  });
});

describe('a getToken that fails', () => {
  test('is tried again with growing pauses, and told', async () => {
    vi.spyOn(Math, 'random').mockReturnValue(1);
    const attempts: number[] = [];
    const { client, status, errors } = setUp({
      getToken: ({ attempt }) => {
        attempts.push(attempt);
        if (attempts.length < 4) throw new Error('offline');
        return 'token';
      },
    });
    client.connect();
    await pass(500 + 1000);
    expect(status()).toBe('connecting');
    await pass(2000);
    expect(status()).toBe('open');
    expect(attempts).toEqual([0, 1, 2, 3]);
    expect(new Set(errors)).toEqual(new Set(['connect_failed']));
  });

  test('one that never ends is given up', async () => {
    const signals: AbortSignal[] = [];
    const { server, client } = setUp({
      getToken: ({ signal }) => {
        signals.push(signal);
        return signals.length === 1 ? new Promise<string>(() => {}) : 't';
      },
    });
    client.connect();
    await pass(10_500);
    expect(signals[0]?.aborted).toBe(true);
    expect(server.connections).toHaveLength(1);
  });
});
