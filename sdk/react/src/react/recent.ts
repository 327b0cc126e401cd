import type { Message } from '../types.js';
import { atNextFrame, forget } from './frame.js';
import { Store } from './store.js';

export interface Shown<T> {
  readonly lastMessage: Message<T> | undefined;
  readonly messages: readonly Message<T>[];
}

const NOTHING: Shown<never> = { lastMessage: undefined, messages: [] };

/**
 * The last messages, for rendering. Nobody is told of one before somebody has read them, and then at most once a
 * frame. Keeps fewer than three times `buffer` messages.
 */
export class Recent<T> extends Store<Shown<T>> {
  /** Came, but are not shown yet. */
  #fresh: Message<T>[] = [];
  #buffer = 0;
  #isRead = false;

  constructor() {
    super(NOTHING);
  }

  /** `buffer`: how many `messages` are kept from now on. `isEqual`: what is no news is left out. */
  add(
    message: Message<T>,
    buffer = 0,
    coalesce: 'frame' | 'none' = 'frame',
    isEqual?: (a: T, b: T) => boolean,
  ): void {
    const last = this.#fresh.at(-1) ?? this.get().lastMessage;
    if (last && isEqual?.(last.data, message.data)) return;
    this.#buffer = buffer;
    if (this.#fresh.push(message) > 2 * buffer) this.#fresh = this.#fresh.slice(-buffer || -1);
    if (!this.#isRead) return;
    if (coalesce === 'none') this.#show();
    else atNextFrame(this.#show);
  }

  /** What is shown now, for a component that renders it: from here on it is told of news. */
  read(): Shown<T> {
    if (!this.#isRead) this.replace(this.#next());
    this.#isRead = true;
    return this.get();
  }

  /** No more will come for now: what there is need not wait for a frame. */
  end(): void {
    forget(this.#show);
    if (this.#isRead) this.#show();
  }

  readonly #show = (): void => this.set(this.#next());

  #next(): Shown<T> {
    const fresh = this.#fresh;
    if (fresh.length === 0) return this.get();
    this.#fresh = [];
    return {
      lastMessage: fresh.at(-1),
      messages: this.#buffer > 0 ? [...this.get().messages, ...fresh].slice(-this.#buffer) : NOTHING.messages,
    };
  }
}
