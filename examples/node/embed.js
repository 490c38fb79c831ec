// How near sentences are to a question, streamed in their order: node embed.js [question] [file]
import { readFileSync } from 'node:fs'

import { Tasks, vectors } from './tasks.js'

const [question = 'How do I make a loaf?', file = new URL('../data/sentences.txt', import.meta.url)] =
  process.argv.slice(2)
const sentences = readFileSync(file, 'utf8').split('\n').filter(Boolean)

// Vectors of length 1: their product is the cosine.
const cosine = (one, other) => one.reduce((sum, number, place) => sum + number * other[place], 0)

const tasks = new Tasks()
try {
  const context = { model: await tasks.modelFor('embed') }
  const embed = (text) => ({ context, inputs: [{ text }], normalize: true })
  const asked = await tasks.ask('Embed', embed(question))
  const [wanted] = vectors(asked.embeddings)
  for await (const { index, response, error } of tasks.stream('EmbedStream', sentences.map(embed))) {
    const nearness = error ? error.code : cosine(wanted, vectors(response.embeddings)[0]).toFixed(3)
    console.log(nearness.padStart(6), '', sentences[index])
  }
} catch (error) {
  console.error(`${error.code ?? error.name}: ${error.message}`)
  process.exitCode = 1
} finally {
  tasks.close()
}
