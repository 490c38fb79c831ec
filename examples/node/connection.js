// Where the suite is, how the connection is secured, and the key that every call carries.
import { readFileSync } from 'node:fs'

import { InterceptingCall, credentials } from '@grpc/grpc-js'

/**
 * Settings by the names that the suite's own programs use.
 *
 * TREADLE_ADDRESS                          "host:port" of the gateway
 * TREADLE_TLS_CA                           PEM file of roots: turns TLS on
 * TREADLE_TLS_CERTIFICATE, …_PRIVATE_KEY   PEM files: this client's identity, under mutual TLS
 * TREADLE_API_KEY, TREADLE_API_KEY_FILE    the bearer key, where the suite asks for one
 */
export function settings(environment = process.env) {
  const read = (name) => (environment[name] ? readFileSync(environment[name]) : null)
  return {
    address: environment.TREADLE_ADDRESS || '127.0.0.1:50051',
    roots: read('TREADLE_TLS_CA'),
    certificate: read('TREADLE_TLS_CERTIFICATE'),
    privateKey: read('TREADLE_TLS_PRIVATE_KEY'),
    apiKey: environment.TREADLE_API_KEY || read('TREADLE_API_KEY_FILE')?.toString().trim() || '',
  }
}

/** The address, credentials and options that a client of @grpc/grpc-js is made of. */
export function connectionTo({ address, roots, certificate, privateKey, apiKey }) {
  const channel = roots ? credentials.createSsl(roots, privateKey, certificate) : credentials.createInsecure()
  const options = {
    // As the suite's own clients: a silent prefill is no dead connection, and a restart is found quickly.
    'grpc.keepalive_time_ms': 60_000,
    'grpc.keepalive_timeout_ms': 20_000,
    'grpc.initial_reconnect_backoff_ms': 100,
    'grpc.max_reconnect_backoff_ms': 2_000,
    'grpc.max_receive_message_length': 16 << 20,
    interceptors: apiKey ? [withKey(apiKey)] : [],
  }
  return [address, channel, options]
}

/** Adds the bearer key to every call. Call credentials would do, but not without TLS, as on loopback. */
function withKey(apiKey) {
  return (options, nextCall) =>
    new InterceptingCall(nextCall(options), {
      start(metadata, listener, next) {
        metadata.set('authorization', `Bearer ${apiKey}`)
        next(metadata, listener)
      },
    })
}
