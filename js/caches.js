// A button on the nodes that fill a cache, which empties it.
import { api } from '../../scripts/api.js'
import { app } from '../../scripts/app.js'
import { addButton, ownTexts, tell } from './buttons.js'
import { translate } from './messages.js'

const CACHES = { AtelierCacheLatents: 'latents', AtelierEncodePrompts: 'prompts' }
let texts

async function clear(what) {
  const { dialog } = app.extensionManager
  if (!(await dialog.confirm({ title: texts.clearCache, message: texts[what] }))) return
  const answer = await api.fetchApi('/atelier/cache/clear', {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify({ what })
  })
  const { freed, error } = await answer.json().catch(() => ({ error: answer.statusText }))
  if (error) tell('error', texts.clearCache, translate(error))
  else tell('success', texts.clearCache, texts.freed.replace('(0)', (freed / 2 ** 20).toFixed(1)))
}

app.registerExtension({
  name: 'Atelier.Caches',
  async setup() {
    texts = (await ownTexts()).caches
  },
  nodeCreated(node) {
    const what = CACHES[node.comfyClass]
    if (what) addButton(node, texts?.clearCache ?? 'Clear cache', () => clear(what))
  }
})
