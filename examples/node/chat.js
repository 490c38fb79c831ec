// One chat answer, streamed: node chat.js [words ...]
//
// Ctrl-C cancels it. With --detach the answer goes on without this client: the request's id and cursor are
// printed after the first words, and `node chat.js --attach ID [CURSOR]` picks the rest up.
import { parseArgs } from 'node:util'

import { TreadleError } from './errors.js'
import { Gateway } from './gateway.js'

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    model: { type: 'string', default: 'smollm2' },
    tokens: { type: 'string', default: '64' },
    detach: { type: 'boolean', default: false },
    attach: { type: 'string' },
  },
})

const gateway = new Gateway()
const interrupted = new AbortController()
process.once('SIGINT', () => interrupted.abort())

function chunks() {
  if (values.attach) return gateway.attach(values.attach, positionals[0] ?? '', { signal: interrupted.signal })
  const content = positionals.join(' ') || 'What is a loom? Answer in one sentence.'
  return gateway.stream(
    {
      model: values.model,
      chat: { messages: [{ role: 'user', content }] },
      sampling: { temperature: 0 },
      stopping: { maxNewTokens: Number(values.tokens) },
      disconnect: { mode: values.detach ? 'DISCONNECT_MODE_DETACH' : 'DISCONNECT_MODE_CANCEL' },
    },
    { signal: interrupted.signal },
  )
}

try {
  let requestId = values.attach
  for await (const { chunk, cursor, started, tokens, finished } of chunks()) {
    if (chunk === 'started') {
      requestId = started.requestId
      console.error(`[${started.artifactDigest}, ${started.promptTokens} tokens read]`)
    } else if (chunk === 'tokens') {
      process.stdout.write(tokens.text)
      if (values.detach) {
        console.error(`\nnode chat.js --attach ${requestId} ${cursor}`)
        break
      }
    } else {
      console.log(`\n${finished.choices[0].finishReason}, ${finished.usage.outputTokens} tokens made`)
    }
  }
} catch (error) {
  if (!(error instanceof TreadleError)) throw error
  console.error(`${error.code} ${error.reason}: ${error.message}`)
  for (const { field, description } of error.fields) console.error(`  ${field}: ${description}`)
  if (error.retryAfterMs !== undefined) console.error(`  try again in ${error.retryAfterMs} ms`)
  process.exitCode = 1
} finally {
  gateway.close()
}
