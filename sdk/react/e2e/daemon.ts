/**
 * The real daemon for the tests in the browser: a process with two workers, and what is published to it.
 *
 *     const daemon = await Daemon.start()
 *     await daemon.publish([{ channel: 'chat', data: 'hello' }])
 *     await daemon.stop()
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { closeSync, existsSync, mkdtempSync, openSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';

const ROOT = resolve(import.meta.dirname, '../../..');
/** Where `make` installs it, unless TORNADO_BCAST names another. */
const COMMAND = process.env.TORNADO_BCAST ?? join(ROOT, '.venv/bin/tornado-bcast');

export interface Item {
  channel: string;
  data: unknown;
  messageId?: string;
}

interface Worker {
  pid: number;
  connections: number;
}

/** Ask again and again until the answer is no `undefined`, `null` or `false`. */
export async function until<T>(
  what: string,
  ask: () => Promise<T> | T,
  milliseconds = 15_000,
): Promise<Exclude<NonNullable<T>, false>> {
  const deadline = Date.now() + milliseconds;
  for (;;) {
    const found = await ask();
    if (found !== undefined && found !== null && found !== false)
      return found as Exclude<NonNullable<T>, false>;
    if (Date.now() > deadline) throw new Error(`not within ${milliseconds} ms: ${what}`);
    await sleep(20);
  }
}

export class Daemon {
  readonly #place = mkdtempSync(join(tmpdir(), 'bcast-e2e-'));
  readonly #ini: string;
  #process: ChildProcess | undefined;
  #port = 0;

  private constructor(ini: string) {
    this.#ini = join(this.#place, 'bcast.ini');
    // Whatever port the file of the example names, here it is a free one.
    writeFileSync(this.#ini, ini);
  }

  static async start(ini: string): Promise<Daemon> {
    if (!existsSync(COMMAND))
      throw new Error(`${COMMAND} is not there: run "make sdk" in ${ROOT}, or set TORNADO_BCAST`);
    const daemon = new Daemon(ini);
    await daemon.start();
    return daemon;
  }

  get url(): string {
    return `http://127.0.0.1:${this.#port}`;
  }

  get wsUrl(): string {
    return `ws://127.0.0.1:${this.#port}`;
  }

  get log(): string {
    return readFileSync(join(this.#place, 'log'), 'utf8');
  }

  /** Run it until it is ready; the second time on the same port, with the same data. */
  async start(): Promise<void> {
    const log = openSync(join(this.#place, 'log'), 'a');
    const before = this.#lines('serving').length;
    const own = /^(BCAST_|LISTEN_|PORT$|BIND$|REDIS_URL$|CORS_ORIGIN$|WORKERS$|NOTIFY_SOCKET$)/;
    const inherited = Object.fromEntries(Object.entries(process.env).filter(([name]) => !own.test(name)));
    const child = spawn(COMMAND, ['serve', '-c', this.#ini], {
      cwd: this.#place,
      env: {
        ...inherited,
        PORT: String(this.#port),
        WORKERS: '2',
        REDIS_URL: 'embedded:',
        BCAST_REDIS_DATA_DIR: join(this.#place, 'redis'),
        BCAST_LOG_FORMAT: 'json',
      },
      stdio: ['ignore', log, log],
    });
    closeSync(log);
    this.#process = child;
    const message = await until('the daemon serves', () => {
      if (child.exitCode !== null) throw new Error(this.log);
      return this.#lines('serving')[before];
    });
    this.#port = Number(/:(\d+)/.exec(message)?.[1]);
    await until('the daemon is ready', async () => {
      const answer = await fetch(`${this.url}/health/ready`).catch(() => undefined);
      return answer?.ok;
    });
  }

  /** The messages of one event of its log. */
  #lines(event: string): string[] {
    const path = join(this.#place, 'log');
    if (!existsSync(path)) return [];
    return this.log
      .split('\n')
      .filter((line) => line.includes(`"event": "${event}"`))
      .map((line) => (JSON.parse(line) as { message: string }).message);
  }

  /** Wait until its log has the `number`th line of an event. */
  async logged(event: string, number = 1): Promise<void> {
    await until(`${event} in the log`, () => this.#lines(event).length >= number, 60_000);
  }

  signal(name: NodeJS.Signals): void {
    this.#process?.kill(name);
  }

  /** End it as an operator would, and keep its data. */
  async halt(): Promise<void> {
    const child = this.#process;
    this.#process = undefined;
    if (!child || child.exitCode !== null) return;
    const ended = once(child, 'exit');
    child.kill('SIGTERM');
    const late = setTimeout(() => child.kill('SIGKILL'), 20_000);
    await ended;
    clearTimeout(late);
  }

  async stop(): Promise<void> {
    await this.halt();
    rmSync(this.#place, { recursive: true, force: true });
  }

  async workers(): Promise<Worker[]> {
    const answer = await fetch(`${this.url}/stats`);
    return ((await answer.json()) as { workers: Worker[] }).workers;
  }

  /** The pid of the worker that has the only connection. */
  async workerInUse(): Promise<number> {
    return until('one worker has one connection', async () => {
      const busy = (await this.workers()).filter((worker) => worker.connections > 0);
      return busy.length === 1 && busy[0]?.connections === 1 && busy[0].pid;
    });
  }

  /**
   * One `POST /broadcast`, again with the same ids until all of it is taken, over any trouble that ends
   * within `patience` ms.
   */
  async publish(items: Item[], patience = 30_000): Promise<void> {
    const body = JSON.stringify({
      messages: items.map((item) => ({ messageId: crypto.randomUUID(), ...item })),
    });
    await until(
      'a publish is taken',
      async () => {
        const answer = await fetch(`${this.url}/broadcast`, {
          method: 'POST',
          body,
          signal: AbortSignal.timeout(5000),
        }).catch(() => undefined);
        if (!answer || answer.status >= 500) return false;
        const { results } = (await answer.json()) as { results?: { error?: unknown }[] };
        if (!results) throw new Error(`a publish is refused with ${answer.status}`);
        return results.every((result) => result.error === undefined);
      },
      patience,
    );
  }
}
