// A button on Image Folder Dataset, which uploads pictures with their captions into a folder below
// input/ and chooses it. ComfyUI's own upload writes the files, and keeps them below input/.
import { api } from '../../scripts/api.js'
import { app } from '../../scripts/app.js'
import { addButton, ownTexts, tell } from './buttons.js'

const KINDS = '.png,.jpg,.jpeg,.webp,.bmp,.txt,.jsonl,.csv,.parquet,.json'
const AT_ONCE = 4
let texts

function pickFiles() {
  const picker = document.createElement('input')
  Object.assign(picker, { type: 'file', multiple: true, accept: KINDS, hidden: true })
  picker.className = 'atelier-upload'
  document.body.append(picker)
  return new Promise((resolve) => {
    const finish = () => {
      picker.remove()
      resolve([...picker.files])
    }
    picker.addEventListener('change', finish)
    picker.addEventListener('cancel', finish)
    picker.click()
  })
}

async function askFolder(folders) {
  const { dialog } = app.extensionManager
  const answer = await dialog.prompt({
    title: texts.upload,
    message: texts.folder,
    defaultValue: 'my_pictures'
  })
  const folder = answer?.trim()
  const question = { title: texts.upload, message: texts.replace.replace('(0)', folder) }
  if (!folder || (folders.includes(folder) && !(await dialog.confirm(question)))) return null
  return folder
}

// A file of the same name is replaced: under another name a caption would lose its picture.
async function send(file, folder) {
  const body = new FormData()
  body.append('image', file)
  body.append('subfolder', folder)
  body.append('type', 'input')
  body.append('overwrite', 'true')
  const answer = await api.fetchApi('/upload/image', { method: 'POST', body })
  if (!answer.ok) throw new Error(`${file.name}: ${answer.status} ${answer.statusText}`)
}

async function upload(node) {
  const files = await pickFiles()
  if (!files.length) return
  const widget = node.widgets.find(({ name }) => name === 'folder')
  const folder = await askFolder(widget.options.values)
  if (!folder) return
  const waiting = [...files]
  const sendWaiting = async () => {
    while (waiting.length) await send(waiting.pop(), folder)
  }
  try {
    await Promise.all(Array.from({ length: AT_ONCE }, sendWaiting))
  } catch (error) {
    return tell('error', texts.upload, texts.failed.replace('(0)', error.message))
  }
  await app.refreshComboInNodes()
  if (widget.options.values.includes(folder)) widget.value = folder
  node.setDirtyCanvas(true, true)
  tell('success', texts.upload, texts.done.replace('(0)', files.length).replace('(1)', folder))
}

app.registerExtension({
  name: 'Atelier.Upload',
  async setup() {
    texts = (await ownTexts()).upload
  },
  nodeCreated(node) {
    if (node.comfyClass !== 'AtelierImageFolderDataset') return
    addButton(node, texts?.upload ?? 'Upload pictures', () => upload(node))
  }
})
