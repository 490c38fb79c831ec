// What the tests ask of the example's registry: node stores.js COMMAND '{"some": "arguments"}'; a JSON value a line.
import { Registry } from '../../examples/node/registry.js'
import { TreadleError } from '../../examples/node/errors.js'

const say = (value) => console.log(JSON.stringify(value))

const COMMANDS = {
  async upload(registry, { path }) {
    say(await registry.upload(path))
  },

  async importFolder(registry, { folder, alias }) {
    say(await registry.importFolder(folder, { alias }))
  },

  async download(registry, { digest, path }) {
    say(await registry.download(digest, path))
  },

  async call(registry, { method, message }) {
    say(await registry.call(method, message))
  },

  /** What a watch says until an alias means an artifact. */
  async watchUntil(registry, { alias, digest }) {
    for await (const notice of registry.watch()) {
      say(notice)
      if (notice.change === 'alias' && notice.alias.name === alias && notice.alias.artifactDigest === digest) return
    }
  },
}

const [name, argument] = process.argv.slice(2)
const registry = new Registry()
try {
  await COMMANDS[name](registry, JSON.parse(argument))
} catch (error) {
  if (!(error instanceof TreadleError)) throw error
  const { code, message, reason, fields } = error
  say({ error: { code, message, reason, fields: fields.map(({ field }) => field) } })
} finally {
  registry.close()
}
