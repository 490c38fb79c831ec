// When a lost call is made again: as the suite's own clients do it.
/** So many failures in a row, and a client gives up. */
export const TRIES = 6
const LONGEST_PAUSE_MS = 2_000

/** How long to wait after the n-th failure in a row, counted from 0. */
export const pauseMs = (error, failures) =>
  Math.min(Math.max(100 * 2 ** failures, error.retryAfterMs ?? 0), LONGEST_PAUSE_MS)
