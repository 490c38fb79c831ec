// May work be sent there, and may the process be kept? node health.js [service]
//
// Health is asked for without a key. The exit code is 0 where it serves.
import { makeClientConstructor } from '@grpc/grpc-js'
import { service as definition } from 'grpc-health-check'

import { connectionTo, settings } from './connection.js'
import { TreadleError } from './errors.js'

const Health = makeClientConstructor(definition)
// "" is readiness; a service's full name is its readiness, too.
const SERVICES = process.argv.length > 2 ? process.argv.slice(2) : ['', 'liveness']

const client = new Health(...connectionTo(settings()))
const check = (service) =>
  new Promise((resolve, reject) => {
    const options = { deadline: Date.now() + 10_000 }
    client.Check({ service }, options, (error, answer) => (error ? reject(error) : resolve(answer.status)))
  })

try {
  for (const service of SERVICES) {
    const status = await check(service)
    console.log((service || 'readiness').padEnd(10), status)
    if (status !== 'SERVING') process.exitCode = 1
  }
} catch (error) {
  const { code, message } = TreadleError.of(error)
  console.error(`${code}: ${message}`)
  process.exitCode = 1
} finally {
  client.close()
}
