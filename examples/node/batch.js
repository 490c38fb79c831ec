// Many prompts on one stream, answered as each is ready; the bad one fails alone: node batch.js
import { Gateway } from './gateway.js'

const COLOURS = ['red', 'green', 'blue', 'yellow', 'violet', 'white']

function* requests() {
  for (const [index, colour] of COLOURS.entries()) {
    yield {
      model: 'smollm2',
      text: `Some things that are ${colour}:`,
      sampling: { temperature: 0, topP: index === 3 ? 2 : 1 },
      stopping: { maxNewTokens: 12 },
    }
  }
}

const gateway = new Gateway()
try {
  for await (const { index, response, error } of gateway.batch(requests())) {
    const said = error
      ? `${error.code}: ${error.fields.map(({ field }) => field)}`
      : response.choices[0].text.replace(/\s+/g, ' ')
    console.log(COLOURS[index].padEnd(8), said)
  }
} finally {
  gateway.close()
}
