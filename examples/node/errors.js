// What went wrong, with the details that the suite sends along.
//
// Every error of the suite is a google.rpc.Status in the trailer grpc-status-details-bin: ErrorInfo with a
// stable reason for programs, BadRequest with the fields at fault, RetryInfo with when to try again. The
// same message stands in a batch's answer to an item.
import { codeName, decode } from './contract.js'

const TRAILER = 'grpc-status-details-bin'
// What a lost connection looks like when no service had a say in it.
const LOST = ['UNAVAILABLE', 'UNKNOWN', 'INTERNAL', 'CANCELLED']

export class TreadleError extends Error {
  /**
   * @param {string} code a status code's name, "INVALID_ARGUMENT"
   * @param {string} message for people
   * @param {{reason?: string, fields?: {field: string, description: string}[], retryAfterMs?: number}} details
   */
  constructor(code, message, { reason = '', fields = [], retryAfterMs, fromSuite = false } = {}) {
    super(message)
    this.name = 'TreadleError'
    this.code = code
    /** Stable and meant for programs, as "LANE_FULL"; "" where no service had a say. */
    this.reason = reason
    /** What is wrong with which field, and the way out. */
    this.fields = fields
    /** When to try again, where the suite says so. */
    this.retryAfterMs = retryAfterMs
    /** False for what the transport says: nobody there, connection lost. */
    this.fromSuite = fromSuite
  }

  /** Whether the call was lost on its way, or nobody was there to take it: it may be made again. */
  get isLoss() {
    return this.code === 'UNAVAILABLE' || (!this.fromSuite && LOST.includes(this.code))
  }

  /** @param {import('@grpc/grpc-js').ServiceError} error of a failed call */
  static of(error) {
    if (error instanceof TreadleError) return error
    const [bytes] = error.metadata?.get(TRAILER) ?? []
    return bytes === undefined
      ? new TreadleError(codeName(error.code), error.details || error.message)
      : TreadleError.ofStatus(decode('google.rpc.Status', bytes))
  }

  /** @param status a google.rpc.Status */
  static ofStatus(status) {
    const details = { fromSuite: true }
    // The loader's own google.protobuf.Any keeps the name as the proto file writes it.
    for (const { type_url: url, value } of status.details) {
      const name = url.split('/').pop()
      const detail = decode(name, value)
      if (name === 'google.rpc.ErrorInfo') details.reason = detail.reason
      if (name === 'google.rpc.BadRequest') details.fields = detail.fieldViolations
      if (name === 'google.rpc.RetryInfo') {
        const { seconds, nanos } = detail.retryDelay
        details.retryAfterMs = seconds * 1e3 + nanos / 1e6
      }
    }
    return new TreadleError(codeName(status.code), status.message, details)
  }
}
