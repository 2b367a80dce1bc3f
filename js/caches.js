// A button on the nodes that fill a cache, which empties it.
import { api } from '../../scripts/api.js'
import { app } from '../../scripts/app.js'
import { translate } from './messages.js'

const CACHES = { AtelierCacheLatents: 'latents', AtelierEncodePrompts: 'prompts' }
let texts

function tell(severity, detail) {
  app.extensionManager.toast.add({ severity, summary: texts.clearCache, detail, life: 8000 })
}

async function clear(what) {
  const { dialog } = app.extensionManager
  if (!(await dialog.confirm({ title: texts.clearCache, message: texts[what] }))) return
  const answer = await api.fetchApi('/atelier/cache/clear', {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify({ what })
  })
  const { freed, error } = await answer.json().catch(() => ({ error: answer.statusText }))
  if (error) tell('error', translate(error))
  else tell('success', texts.freed.replace('(0)', (freed / 2 ** 20).toFixed(1)))
}

app.registerExtension({
  name: 'Atelier.Caches',
  async setup() {
    const language = app.extensionManager.setting.get('Comfy.Locale')
    const all = await (await api.fetchApi('/i18n')).json()
    texts = (all[language]?.atelierTexts ?? all.en.atelierTexts).caches
  },
  nodeCreated(node) {
    const what = CACHES[node.comfyClass]
    if (!what) return
    // Nodes 2.0 (frontend 1.32) shows the name of a button, the classic canvas its label or name.
    const button = node.addWidget('button', texts?.clearCache ?? 'Clear cache', null, () => clear(what))
    button.serialize = false
    button.options.serialize = false
  }
})
