// A port that tells its own contract: no proto file is needed to call it. node reflect.js
//
// Prints every service and method of the port. Reflection asks for a key where the suite has keys.
import { pathToFileURL } from 'node:url'

import { loadPackageDefinition } from '@grpc/grpc-js'
import { GrpcReflection } from 'grpc-js-reflection-client'

import { connectionTo, settings } from './connection.js'
import { TreadleError } from './errors.js'

const DEADLINE_MS = 30_000
// Names are those of the proto files: generation.stopping.max_new_tokens.
const DECODING = { keepCase: true, longs: Number, enums: String, defaults: true, oneofs: true }

const inTime = () => ({ deadline: Date.now() + DEADLINE_MS })

/** Asks the port what it serves; `connection` is [address, credentials, options]. */
export async function reflect(connection) {
  const reflection = new GrpcReflection(...connection)
  const services = await reflection.listServices('*', inTime()).catch((error) => {
    const [, code = 'UNKNOWN', message = error.message] = /\d+ ([A-Z_]+): (.*)/.exec(error.message) ?? []
    throw new TreadleError(code, message)
  })
  return new Port(connection, reflection, services)
}

class Port {
  #clients = new Map()
  #connection
  #reflection

  constructor(connection, reflection, services) {
    this.#connection = connection
    this.#reflection = reflection
    /** Full names of the services, as "treadle.api.inference.v1.InferenceService". */
    this.services = services
  }

  /** A client of @grpc/grpc-js for a service of this port, made of what the port says of it. */
  async client(service) {
    if (!this.#clients.has(service)) {
      const described = await this.#reflection.getDescriptorBySymbol(service, inTime())
      const found = loadPackageDefinition(described.getPackageDefinition(DECODING))
      const Client = service.split('.').reduce((part, name) => part[name], found)
      this.#clients.set(service, new Client(...this.#connection))
    }
    return this.#clients.get(service)
  }

  /** One unary call. */
  async call(service, method, message) {
    const client = await this.client(service)
    const options = inTime()
    return new Promise((resolve, reject) => {
      client[method](message, options, (error, response) => {
        if (error) reject(TreadleError.of(error))
        else resolve(response)
      })
    })
  }

  /** One call that answers with a stream: an async iterable of its messages. */
  async stream(service, method, message) {
    const client = await this.client(service)
    return client[method](message, inTime())
  }

  close() {
    for (const client of this.#clients.values()) client.close()
    this.#reflection.client.close()
  }
}

async function main() {
  const port = await reflect(connectionTo(settings()))
  try {
    for (const service of port.services) {
      console.log(service)
      const client = await port.client(service)
      for (const { path } of Object.values(client.constructor.service)) console.log(`  ${path}`)
    }
  } finally {
    port.close()
  }
}

if (import.meta.url === pathToFileURL(process.argv[1]).href) {
  await main().catch((error) => {
    if (!(error instanceof TreadleError)) throw error
    console.error(`${error.code}: ${error.message}`)
    process.exitCode = 1
  })
}
