// The best label of each text: node classify.js "What a lovely day!" "This soup is cold."
import { Tasks } from './tasks.js'

const texts = process.argv.slice(2)
if (texts.length === 0) texts.push('What a lovely day!', 'This soup is cold.')

const tasks = new Tasks()
try {
  const context = { model: await tasks.modelFor('classify') }
  const inputs = texts.map((text) => ({ text }))
  const { classifications } = await tasks.ask('Classify', { context, inputs, topK: 1 })
  classifications.forEach(({ labels: [best] }, index) => {
    console.log(`${(100 * best.score).toFixed(1).padStart(5)}%  ${best.label.padEnd(10)} ${texts[index]}`)
  })
} catch (error) {
  console.error(`${error.code ?? error.name}: ${error.message}`)
  process.exitCode = 1
} finally {
  tasks.close()
}
