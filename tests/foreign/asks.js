// What the tests ask of the example client in examples/node: node asks.js COMMAND '{"some": "arguments"}'
//
// Prints what comes, one JSON value a line; an error as {"error": {code, reason, fields, ...}}.
import { connectionTo, settings } from '../../examples/node/connection.js'
import { TreadleError } from '../../examples/node/errors.js'
import { Gateway } from '../../examples/node/gateway.js'
import { reflect } from '../../examples/node/reflect.js'
import { Tasks, vectors } from '../../examples/node/tasks.js'

const say = (value) => console.log(JSON.stringify(value))

function sayError(error) {
  if (!(error instanceof TreadleError)) throw error
  const { code, message, reason, fields, retryAfterMs, fromSuite } = error
  say({ error: { code, message, reason, fields, retryAfterMs, fromSuite } })
}

/** Prints chunks; after `leaveAfter` of them the loop is left, after `abortAfter` the signal is given. */
async function sayChunks(chunks, { leaveAfter, abortAfter, stop }) {
  let count = 0
  for await (const chunk of chunks) {
    say(chunk)
    count += 1
    if (count === leaveAfter) break
    if (count === abortAfter) stop.abort()
  }
}

const COMMANDS = {
  async stream(gateway, { generation, ...how }) {
    const stop = new AbortController()
    await sayChunks(gateway.stream(generation, { signal: stop.signal }), { ...how, stop })
  },

  async attach(gateway, { requestId, cursor, ...how }) {
    await sayChunks(gateway.attach(requestId, cursor), how)
  },

  async generate(gateway, { generation }) {
    say(await gateway.generate(generation))
  },

  async cancel(gateway, { requestId }) {
    say(await gateway.cancel(requestId))
  },

  async models(gateway) {
    say(await gateway.models())
  },

  async batch(gateway, { generations }) {
    for await (const { index, response, error } of gateway.batch(generations)) {
      if (error) say({ index, error: { code: error.code, fields: error.fields, reason: error.reason } })
      else say({ index, response })
    }
  },

  /** Ordered streams of tasks; vectors as JSON's numbers. `failAfter` requests their source throws. */
  async tasks(_, { method, requests, window, failAfter }) {
    async function* source() {
      for (const [index, request] of requests.entries()) {
        if (index === failAfter) throw new TreadleError('CANCELLED', 'the source failed')
        yield request
      }
    }
    const tasks = new Tasks()
    try {
      for await (const { index, response, error } of tasks.stream(method, source(), { window })) {
        if (error) say({ index, error: { code: error.code, reason: error.reason, fields: error.fields } })
        else if (response.embeddings) say({ index, rows: vectors(response.embeddings).map((row) => [...row]) })
        else say({ index, response })
      }
    } finally {
      tasks.close()
    }
  },

  /** Calls of a port by reflection alone: [[service, method, message], ...]. */
  async reflected(_, { calls }) {
    const port = await reflect(connectionTo(settings()))
    try {
      say(port.services)
      for (const [service, method, message] of calls) say(await port.call(service, method, message))
    } finally {
      port.close()
    }
  },
}

const [command, argument = '{}'] = process.argv.slice(2)
const gateway = new Gateway()
try {
  await COMMANDS[command](gateway, JSON.parse(argument))
} catch (error) {
  sayError(error)
} finally {
  gateway.close()
}
