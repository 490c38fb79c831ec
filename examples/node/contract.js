// The suite's contracts, loaded from protos/ as they are: nothing is generated, nothing is copied.
//
// What they import of Google's (google/rpc, google/longrunning) comes from the package google-proto-files;
// google/protobuf comes with the loader.
import { createRequire } from 'node:module'
import { dirname } from 'node:path'
import { fileURLToPath } from 'node:url'

import { loadPackageDefinition } from '@grpc/grpc-js'
import { loadSync } from '@grpc/proto-loader'

const SUITE = process.env.TREADLE_PROTOS ?? fileURLToPath(new URL('../../protos', import.meta.url))
const GOOGLE = dirname(createRequire(import.meta.url).resolve('google-proto-files/package.json'))

const definition = loadSync(
  [
    'treadle/api/inference/v1/inference.proto',
    'treadle/api/registry/v1/registry.proto',
    'treadle/api/tokenizer/v1/tokenizer.proto',
    'google/rpc/error_details.proto',
    'google/rpc/status.proto',
  ],
  {
    includeDirs: [SUITE, GOOGLE],
    // Names as JavaScript writes them: generation.maxNewTokens.
    keepCase: false,
    // A seed has 53 bits at most, so that it fits a JavaScript number; so do the other counts.
    longs: Number,
    enums: String,
    defaults: true,
    // response.chunk.chunk names which of "started", "tokens" and "finished" is set.
    oneofs: true,
  },
)

const packages = loadPackageDefinition(definition)
const api = packages.treadle.api

export const InferenceService = api.inference.v1.InferenceService
export const Operations = packages.google.longrunning.Operations
export const RegistryService = api.registry.v1.RegistryService
export const TokenizerService = api.tokenizer.v1.TokenizerService

/** Decodes the bytes of a message by its full name, as "google.rpc.Status". */
export function decode(name, bytes) {
  const message = definition[name]
  return message === undefined ? undefined : message.deserialize(bytes)
}

const CODES = [
  'OK',
  'CANCELLED',
  'UNKNOWN',
  'INVALID_ARGUMENT',
  'DEADLINE_EXCEEDED',
  'NOT_FOUND',
  'ALREADY_EXISTS',
  'PERMISSION_DENIED',
  'RESOURCE_EXHAUSTED',
  'FAILED_PRECONDITION',
  'ABORTED',
  'OUT_OF_RANGE',
  'UNIMPLEMENTED',
  'INTERNAL',
  'UNAVAILABLE',
  'DATA_LOSS',
  'UNAUTHENTICATED',
]

/** A status code's name. */
export const codeName = (code) => CODES[code] ?? 'UNKNOWN'
