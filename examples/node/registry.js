// A model store as promises: upload a folder, import it, point an alias at it, fetch what clients need.
import { createHash } from 'node:crypto'
import { createReadStream, createWriteStream } from 'node:fs'
import { readdir, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'

import { connectionTo, settings } from './connection.js'
import { Operations, RegistryService, decode } from './contract.js'
import { TreadleError } from './errors.js'

const CHUNK = 1 << 20
/** In the initial metadata of an upload that the registry takes. */
const ACCEPTED = 'upload-accepted'
const POLL_MS = 100

export class Registry {
  #client
  #operations

  /** `connection.address` is the registry's, not the gateway's. */
  constructor(connection = settings()) {
    this.#client = new RegistryService(...connectionTo(connection))
    this.#operations = new Operations(...connectionTo(connection))
  }

  close() {
    this.#client.close()
    this.#operations.close()
  }

  /** Any unary method of the contract by its name. */
  call(method, message, timeoutMs = 10_000) {
    return unary(this.#client, method, message, timeoutMs)
  }

  /**
   * Sends a file from where an earlier try ended; gives {digest, sent}, sent being the bytes that went over
   * the wire. What the registry has already is not sent again.
   */
  async upload(path) {
    const [digest, { size }] = [await digestOf(path), await stat(path)]
    const { committedBytes, complete } = await this.call('GetUpload', { digest })
    if (complete) return { digest, sent: 0 }
    const start = Number(committedBytes)
    await new Promise((resolve, reject) => {
      const call = this.#client.UploadBlob((error) => (error ? reject(TreadleError.of(error)) : resolve()))
      send(call, path, { digest, totalBytes: size, start }).catch((error) => {
        call.cancel()
        reject(error)
      })
    })
    return { digest, sent: size - start }
  }

  /** Uploads the files of a folder and imports them as one model; gives ImportModelResponse. */
  async importFolder(folder, { alias = '' } = {}) {
    const files = []
    for (const name of (await readdir(folder)).sort()) {
      files.push({ name, digest: (await this.upload(join(folder, name))).digest })
    }
    return this.ended(await this.call('ImportModel', { uploaded: { files, source: `node:${folder}` }, alias }))
  }

  /** The response of an operation once it has ended; throws its error. */
  async ended(operation) {
    while (!operation.done) {
      await sleep(POLL_MS)
      operation = await unary(this.#operations, 'GetOperation', { name: operation.name }, 10_000)
    }
    if (operation.error) throw TreadleError.ofStatus(operation.error)
    return decode(operation.response.type_url.split('/').pop(), operation.response.value)
  }

  /** Fetches a file of an artifact, and says whether what came has the digest that was asked for. */
  async download(digest, path) {
    const call = this.#client.DownloadBlob({ digest, offset: 0 }, { deadline: Date.now() + 3_600_000 })
    const [hash, out] = [createHash('sha256'), createWriteStream(path)]
    try {
      for await (const { data } of call) {
        hash.update(data)
        // The registry reads on as this drains.
        if (!out.write(data)) await new Promise((resolve) => out.once('drain', resolve))
      }
    } catch (error) {
      throw TreadleError.of(error)
    } finally {
      await new Promise((resolve) => out.end(resolve))
    }
    return `sha256:${hash.digest('hex')}` === digest
  }

  /** Aliases and deployments as they change; the whole state first, between `reset` and `complete`. */
  async *watch(version = '') {
    const call = this.#client.WatchModels({ version })
    try {
      yield* call
    } catch (error) {
      throw TreadleError.of(error)
    } finally {
      call.cancel()
    }
  }
}

async function digestOf(path) {
  const hash = createHash('sha256')
  for await (const chunk of createReadStream(path)) hash.update(chunk)
  return `sha256:${hash.digest('hex')}`
}

/** Sends the rest of a file, as long as the call lasts: its callback says how it ended. */
async function send(call, path, { digest, totalBytes, start }) {
  let over = false
  const ended = new Promise((resolve) => call.once('status', resolve)).then(() => (over = true))
  const answered = new Promise((resolve) => call.once('metadata', resolve))
  let offset = start
  call.write({ digest, totalBytes, offset, data: Buffer.alloc(0) })
  // Who sends before the registry has answered may not hear why it refuses: gRPC breaks the call off.
  await Promise.race([answered.then((metadata) => metadata.get(ACCEPTED).length || ended), ended])
  if (over) return
  for await (const data of createReadStream(path, { start, highWaterMark: CHUNK })) {
    if (over) break
    if (!call.write({ offset, data })) {
      await Promise.race([new Promise((resolve) => call.once('drain', resolve)), ended])
    }
    offset += data.length
  }
  if (!over) call.end()
}

function unary(client, method, message, timeoutMs) {
  return new Promise((resolve, reject) => {
    client[method](message, { deadline: Date.now() + timeoutMs }, (error, response) =>
      error ? reject(TreadleError.of(error)) : resolve(response),
    )
  })
}
