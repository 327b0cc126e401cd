/** The one class of errors that this package makes. */
import type { ErrorCode } from '../types.js';

interface Details {
  channel?: string | null | undefined;
  retryAfter?: number | undefined;
  cause?: unknown;
}

/** What went wrong: look at `code`; `message` is a sentence for people. */
export class BroadcastError extends Error {
  declare readonly code: ErrorCode;
  /** The channel that it is about. */
  declare readonly channel: string | undefined;
  /** Do not try again before so many ms. */
  declare readonly retryAfter: number | undefined;

  constructor(code: ErrorCode, message: string, details: Details = {}) {
    super(message, details);
    const { channel, retryAfter } = details;
    Object.assign(this, { name: 'BroadcastError', code, channel: channel ?? undefined, retryAfter });
  }
}
