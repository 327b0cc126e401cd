/** The built example, served as any web server would, and a real Chromium that shows it. */
import { existsSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { type Browser, type BrowserContext, chromium, type Page } from 'playwright-core';
import { build, preview } from 'vite';

const EXAMPLE = resolve(import.meta.dirname, '../example');
const SCREENSHOTS = resolve(import.meta.dirname, '../../../build/screenshots');

const FLAGS = [
  '--no-sandbox', // It is root in containers, and what it opens is ours.
  '--disable-gpu',
  '--disable-dev-shm-usage',
  '--disable-quic',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
];

/** What the browser and the client say while there is no way to the server. */
const LOST = /WebSocket connection to|BroadcastError: Cannot connect to ws:/;

/** The path of a Chromium, if there is one. */
export function findChromium(): string | undefined {
  const names = ['chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'];
  const places = (process.env.PATH ?? '').split(':');
  return places.flatMap((place) => names.map((name) => join(place, name))).find((path) => existsSync(path));
}

/** One tab with storage of its own. `problems`: what its console shows in red, but for lost connections. */
export interface Tab {
  page: Page;
  context: BrowserContext;
  problems: string[];
}

export class Site {
  readonly #browser: Browser;
  readonly #server: Awaited<ReturnType<typeof preview>>;

  private constructor(browser: Browser, server: Awaited<ReturnType<typeof preview>>) {
    this.#browser = browser;
    this.#server = server;
  }

  /** Build the example, serve it on a free port, and start the browser. */
  static async open(executablePath: string): Promise<Site> {
    // 'error': Vite warns of each 'use client', which says nothing to it.
    await build({ root: EXAMPLE, logLevel: 'error' });
    const server = await preview({
      root: EXAMPLE,
      logLevel: 'warn',
      preview: { host: '127.0.0.1', port: 0 },
    });
    const browser = await chromium.launch({ executablePath, args: FLAGS });
    return new Site(browser, server);
  }

  async close(): Promise<void> {
    await this.#browser.close();
    await this.#server.close();
  }

  /** Open the example in a tab of its own, connected to `server` (ws://...). */
  async tab(server: string, look: { dark?: boolean; width?: number; height?: number } = {}): Promise<Tab> {
    const context = await this.#browser.newContext({
      colorScheme: look.dark ? 'dark' : 'light',
      viewport: { width: look.width ?? 1180, height: look.height ?? 720 },
    });
    const page = await context.newPage();
    const problems: string[] = [];
    page.on('pageerror', (error) => problems.push(String(error)));
    page.on('console', (message) => {
      if (message.type() === 'error' && !LOST.test(message.text())) problems.push(message.text());
    });
    const base = this.#server.resolvedUrls?.local[0];
    await page.goto(`${base}?server=${server}`);
    await page.locator('.status[data-state=open]').waitFor();
    return { page, context, problems };
  }
}

/** Keep what a page looks like, for people to look at. */
export async function picture(page: Page, name: string, fullPage = false): Promise<void> {
  await page.screenshot({ path: join(SCREENSHOTS, `${name}.png`), animations: 'disabled', fullPage });
}

/** What the chat shows, from the first line to the last. */
export async function lines(page: Page, begin = ''): Promise<string[]> {
  const all = await page.locator('ol li p').allTextContents();
  return all.filter((line) => line.startsWith(begin));
}

export async function say(page: Page, name: string, text: string): Promise<void> {
  await page.getByLabel('Your name').fill(name);
  await page.getByLabel('Message').fill(text);
  await page.getByRole('button', { name: 'Send' }).click();
}
