// What our buttons share: their texts in the page's language, and what they tell.
import { api } from '../../scripts/api.js'
import { app } from '../../scripts/app.js'

let loaded

export function ownTexts() {
  const language = app.extensionManager.setting.get('Comfy.Locale')
  loaded ??= api
    .fetchApi('/i18n')
    .then((answer) => answer.json())
    .then((all) => all[language]?.atelierTexts ?? all.en.atelierTexts)
  return loaded
}

export function addButton(node, label, press) {
  // Nodes 2.0 (frontend 1.32) shows the name of a button, the classic canvas its label or name.
  const button = node.addWidget('button', label, null, press)
  button.serialize = false
  button.options.serialize = false
}

export function tell(severity, summary, detail) {
  app.extensionManager.toast.add({ severity, summary, detail, life: 8000 })
}
