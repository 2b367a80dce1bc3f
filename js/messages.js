// The server speaks English; here its sentences become those of the page's language, before the
// page shows them. locales/<language>/main.json has them as templates: "… got {0}. 4 to 32 is usual."
import { api } from '../../scripts/api.js'
import { app } from '../../scripts/app.js'

let templates = []

const escapeRegExp = (text) => text.replace(/[.*+?^${}()|[\]\\]/g, '\\$&')

function toTemplate([english, translation]) {
  const numbers = [...english.matchAll(/\{(\d+)\}/g)].map(([, number]) => number)
  const literals = english.split(/\{\d+\}/)
  return {
    pattern: new RegExp(`^${literals.map(escapeRegExp).join('(.*?)')}$`, 's'),
    numLiterals: literals.join('').length,
    fill: (values) =>
      translation.replace(/\{(\d+)\}/g, (_, number) => values[numbers.indexOf(number)])
  }
}

function translateSentence(text) {
  for (const { pattern, fill } of templates) {
    const match = pattern.exec(text)
    if (match) return fill(match.slice(1))
  }
  return text
}

// A message is several templates, each on a line of its own, or one, whose values may have lines. A
// value that ends a template would match all lines after it, so single lines are looked at first.
export function translate(message) {
  const lines = message.trim().split('\n')
  const translated = lines.map(translateSentence)
  if (translated.every((line, index) => line !== lines[index])) return translated.join('\n')
  const whole = translateSentence(message.trim())
  return whole === message.trim() ? translated.join('\n') : whole
}

// ComfyUI puts the name of the input before what a node says about it: "model - The model …".
function translateRefusals(answer) {
  for (const { errors } of Object.values(answer?.node_errors ?? {}))
    for (const error of errors) {
      const [input, ...rest] = (error.details ?? '').split(' - ')
      if (rest.length) error.details = `${input} - ${translate(rest.join(' - '))}`
    }
  return answer
}

// Listeners share the event's detail. Capturing ones come first, so all others see the translation.
const capture = { capture: true }
api.addEventListener(
  'execution_error',
  ({ detail }) => (detail.exception_message = translate(detail.exception_message ?? '')),
  capture
)
api.addEventListener(
  'progress_text',
  ({ detail }) => (detail.text = translate(detail.text)),
  capture
)

app.registerExtension({
  name: 'Atelier.Messages',
  async setup() {
    const language = app.extensionManager.setting.get('Comfy.Locale')
    const texts = (await (await api.fetchApi('/i18n')).json())[language]?.atelierMessages ?? {}
    // The one with the longest fixed text first: it says most about what it matches.
    templates = Object.entries(texts)
      .map(toTemplate)
      .sort((a, b) => b.numLiterals - a.numLiterals)
    if (!templates.length) return
    const queuePrompt = api.queuePrompt
    api.queuePrompt = async function (...options) {
      try {
        return translateRefusals(await queuePrompt.apply(this, options))
      } catch (error) {
        translateRefusals(error.response)
        throw error
      }
    }
  }
})
