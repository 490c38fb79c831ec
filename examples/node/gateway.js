// The gateway as promises and async iterators: one request, a stream that survives its connection, a batch.
import { randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'

import { InferenceService } from './contract.js'
import { connectionTo, settings } from './connection.js'
import { TreadleError } from './errors.js'
import { TRIES, pauseMs } from './retries.js'

export class Gateway {
  #client

  constructor(connection = settings()) {
    this.#client = new InferenceService(...connectionTo(connection))
  }

  close() {
    this.#client.close()
  }

  /** Runs one request to its end: {started, choices, usage}. */
  generate(generation, { timeoutMs = 600_000, signal } = {}) {
    return this.#unary('Generate', { generation: withId(generation) }, timeoutMs, signal)
  }

  /**
   * The chunks of an answer: {cursor, chunk: "started" | "tokens" | "finished", started?, tokens?, finished?}.
   *
   * A connection that is lost is made again, and the stream goes on after the last chunk that arrived:
   * every token comes once. That needs a request that outlives its connection, so ask with
   * disconnect.mode = DISCONNECT_MODE_DETACH. Leaving the loop, or `signal`, drops the connection.
   */
  async *stream(generation, options = {}) {
    const asked = withId(generation)
    yield* this.#chunks(asked, '', options)
  }

  /** The chunks of a request that somebody asked for before, after `cursor`; '': from its start. */
  async *attach(requestId, cursor = '', { tenant = '', ...options } = {}) {
    yield* this.#chunks({ requestId, tenant }, cursor, { ...options, attached: true })
  }

  async *#chunks(asked, cursor, { timeoutMs = 600_000, signal, attached = false }) {
    const deadline = Date.now() + timeoutMs
    let failures = 0
    while (true) {
      // An answer may be lost before its first chunk: the same id asks for the same run again.
      const call =
        cursor || attached
          ? this.#client.Attach({ requestId: asked.requestId, tenant: asked.tenant, cursor }, { deadline })
          : this.#client.GenerateStream({ generation: asked }, { deadline })
      const abort = () => call.cancel()
      signal?.addEventListener('abort', abort)
      if (signal?.aborted) abort()
      try {
        for await (const { chunk } of call) {
          failures = 0
          cursor = chunk.cursor
          yield chunk
          if (chunk.chunk === 'finished') return
        }
        return
      } catch (error) {
        const known = TreadleError.of(error)
        if (!known.isLoss || signal?.aborted || failures >= TRIES) throw known
        const pause = pauseMs(known, failures)
        if (Date.now() + pause >= deadline) throw known
        failures += 1
        await sleep(pause)
      } finally {
        signal?.removeEventListener('abort', abort)
        call.cancel()
      }
    }
  }

  /** Ends a request wherever it is; false where it had ended before. */
  async cancel(requestId, { tenant = '' } = {}) {
    return (await this.#unary('Cancel', { requestId, tenant }, 10_000)).cancelled
  }

  /** What can be asked for now. */
  async models() {
    return (await this.#unary('ListModels', {}, 10_000)).models
  }

  /**
   * Runs many requests on one stream; yields {index, requestId, response} or {index, requestId, error} as each
   * is ready, in any order. Requests are read from `generations` as the suite takes them.
   */
  async *batch(generations, { timeoutMs = 3_600_000 } = {}) {
    const call = this.#client.BatchGenerate({ deadline: Date.now() + timeoutMs })
    const sending = send(call, generations)
    try {
      for await (const { index, requestId, outcome, response, error } of call) {
        yield outcome === 'error'
          ? { index, requestId, error: TreadleError.ofStatus(error) }
          : { index, requestId, response }
      }
      await sending
    } catch (error) {
      throw TreadleError.of(error)
    } finally {
      call.cancel()
      await sending.catch(() => {})
    }
  }

  #unary(method, message, timeoutMs, signal) {
    return new Promise((resolve, reject) => {
      const options = { deadline: Date.now() + timeoutMs }
      const call = this.#client[method](message, options, (error, response) => {
        signal?.removeEventListener('abort', abort)
        if (error) reject(TreadleError.of(error))
        else resolve(response)
      })
      const abort = () => call.cancel()
      signal?.addEventListener('abort', abort)
      if (signal?.aborted) abort()
    })
  }
}

/** An id of the client's own makes a call safe to repeat. */
const withId = (generation) => ({ ...generation, requestId: generation.requestId || randomUUID() })

async function send(call, generations) {
  const ended = new Promise((resolve) => call.once('close', resolve))
  for await (const generation of generations) {
    if (call.destroyed) return
    // The suite takes so many at once; until it takes more, nothing further is read.
    if (!call.write({ generation: withId(generation) })) {
      await Promise.race([new Promise((resolve) => call.once('drain', resolve)), ended])
    }
  }
  call.end()
}
