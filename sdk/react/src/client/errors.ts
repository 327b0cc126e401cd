/** The one class of errors that this package makes. */
import type { ErrorCode } from '../types.js';

/** What went wrong: look at `code`; `message` is a sentence for people. */
export class BroadcastError extends Error {
  readonly code: ErrorCode;
  /** The channel that it is about. */
  readonly channel: string | undefined;
  /** Do not try again before so many ms. */
  readonly retryAfter: number | undefined;

  constructor(
    code: ErrorCode,
    message: string,
    details: { channel?: string | undefined; retryAfter?: number | undefined; cause?: unknown } = {},
  ) {
    super(message, 'cause' in details ? { cause: details.cause } : undefined);
    this.name = 'BroadcastError';
    this.code = code;
    this.channel = details.channel;
    this.retryAfter = details.retryAfter;
  }
}
