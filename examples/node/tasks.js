// Vectors, labels, spans, rankings and log-probabilities: one request, or many on an ordered stream.
import { randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'

import { InferenceService } from './contract.js'
import { connectionTo, settings } from './connection.js'
import { TreadleError } from './errors.js'
import { TRIES, pauseMs } from './retries.js'

export class Tasks {
  #client

  constructor(connection = settings()) {
    this.#client = new InferenceService(...connectionTo(connection))
  }

  close() {
    this.#client.close()
  }

  /** The first served model that can do a task: "embed", "classify", "tag", "rerank", "score". */
  async modelFor(task) {
    const { models } = await this.ask('ListModels', {})
    const found = models.find(({ tasks }) => tasks.includes(task))
    if (!found) throw new TreadleError('FAILED_PRECONDITION', `no served model can ${task}`)
    return found.model
  }

  /** One request by its method's name: ask('Embed', { context: { model }, inputs: [{ text }] }). */
  ask(method, request, timeoutMs = 60_000) {
    return new Promise((resolve, reject) => {
      this.#client[method](request, { deadline: Date.now() + timeoutMs }, (error, response) =>
        error ? reject(TreadleError.of(error)) : resolve(response),
      )
    })
  }

  /**
   * Many requests: stream('EmbedStream', requests) yields {index, requestId, response} or {index, requestId,
   * error} in the requests' order. At most `window` of them wait for their answers at a time. A call that is
   * lost is made again with those that have no answer, under the same ids, so none is computed twice.
   */
  async *stream(method, requests, { window = 32, timeoutMs = 3_600_000 } = {}) {
    const deadline = Date.now() + timeoutMs
    const source = new Source(requests, window)
    let failures = 0
    try {
      while (!source.isDone) {
        const call = this.#client[method]({ deadline })
        const sending = source.sendTo(call)
        try {
          for await (const { requestId, outcome, response, error } of call) {
            const problem = outcome === 'error' && TreadleError.ofStatus(error)
            if (problem && source.isLost(requestId, problem)) throw problem
            failures = 0
            const index = source.answered(requestId)
            yield problem ? { index, requestId, error: problem } : { index, requestId, response }
          }
          await sending
          if (!source.isDone) throw new TreadleError('DATA_LOSS', 'the stream ended before its answers')
        } catch (error) {
          if (source.error) throw source.error
          const known = TreadleError.of(error)
          const pause = pauseMs(known, failures)
          if (!(known.isLoss || source.hasLost) || failures >= TRIES || Date.now() + pause >= deadline) throw known
          failures += 1
          await sleep(pause)
        } finally {
          call.cancel()
          await sending
        }
      }
    } finally {
      await source.close()
    }
  }
}

/** The vectors of EmbedResponse.embeddings: one Float32Array a text. */
export function vectors({ shape: [count, width], dtype, data }) {
  if (dtype !== 'F32') throw new TreadleError('INTERNAL', `not float32 but ${dtype}`)
  // A copy: what gRPC hands out lies anywhere in its buffer, and floats want a multiple of four.
  const numbers = new Float32Array(Uint8Array.from(data).buffer)
  return Array.from({ length: count }, (_, row) => numbers.subarray(row * width, (row + 1) * width))
}

/** The requests of a stream: those that wait for their answers, and where the next ones come from. */
class Source {
  error = null
  /** Whether the call that just ended did so for an item's error. */
  hasLost = false
  #iterator
  #window
  #waiting = []
  #pulling = null
  #count = 0
  #exhausted = false
  #makeRoom = () => {}

  constructor(requests, window) {
    this.#iterator = requests[Symbol.asyncIterator]?.() ?? requests[Symbol.iterator]()
    this.#window = window
  }

  get isDone() {
    return this.#exhausted && this.#waiting.length === 0
  }

  /** The index of the request that was answered, always the first of those that wait. */
  answered(requestId) {
    const first = this.#waiting.shift()
    if (first?.id !== requestId) throw new TreadleError('DATA_LOSS', 'the answers are out of order')
    this.#makeRoom()
    return first.index
  }

  /**
   * Whether an item's error is its call's: the gateway stops, or one saw the call before this one break, took it
   * for a client that left, and cancelled what ran on it. That has to be asked under another id.
   */
  isLost(requestId, { code, reason }) {
    const first = this.#waiting[0]
    if (first?.id !== requestId) return false
    this.hasLost = reason === 'DRAINING' || (code === 'CANCELLED' && first.calls > 1)
    if (this.hasLost && code === 'CANCELLED') {
      for (const one of this.#waiting.filter(({ calls }) => calls > 1)) one.renew()
    }
    return this.hasLost
  }

  /** Sends what waits, then what comes, until the requests or the call end. */
  async sendTo(call) {
    let over = false
    this.hasLost = false
    const ended = new Promise((resolve) => call.once('close', resolve)).then(() => (over = true))
    for (const one of this.#waiting) call.write(one.sent())
    try {
      while (!this.#exhausted && !over) {
        if (this.#waiting.length >= this.#window) {
          await Promise.race([new Promise((resolve) => (this.#makeRoom = resolve)), ended])
          continue
        }
        // A request that was asked for while a call broke is the next call's.
        this.#pulling ??= Promise.resolve(this.#iterator.next())
        await Promise.race([this.#pulling, ended])
        if (over) return
        const { done, value } = await this.#pulling
        this.#pulling = null
        if (done) {
          this.#exhausted = true
        } else {
          call.write(this.#keep(value))
        }
      }
      if (!over) call.end()
    } catch (error) {
      this.error = error
      call.cancel()
    }
  }

  #keep(request) {
    const one = new Waiting(this.#count++, request)
    this.#waiting.push(one)
    return one.sent()
  }

  async close() {
    await this.#iterator.return?.()
  }
}

class Waiting {
  calls = 0

  constructor(index, request) {
    this.index = index
    this.request = request
    this.id = request.context?.requestId || randomUUID()
  }

  renew() {
    this.id = randomUUID()
    this.calls = 0
  }

  /** The message, and that one more call has it. */
  sent() {
    this.calls += 1
    return { request: { ...this.request, context: { ...this.request.context, requestId: this.id } } }
  }
}
