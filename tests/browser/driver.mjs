// Drives one page of a headless Chromium: a JSON command per line on stdin, a JSON answer on stdout.
// Started by page.py with: node driver.mjs NODE_MODULES CHROMIUM
import { createRequire } from 'node:module'
import { createInterface } from 'node:readline'

const [modules, executablePath] = process.argv.slice(2)
const { chromium } = createRequire(`${modules}/`)('playwright-core')
const browser = await chromium.launch({ executablePath, args: ['--no-sandbox', '--disable-gpu'] })
let page
const problems = [] // error messages of the console and uncaught exceptions since the last `open`

async function loaded() {
  // `window.app` is set when ComfyUI's setup is done; what was open last is loaded after that.
  await page.waitForFunction('window.app?.graph && window.app.extensionManager', null, {
    timeout: 120000
  })
}

async function newPage(context, url) {
  page = await context.newPage()
  page.on('pageerror', (error) => problems.push(`${error.stack ?? error}`))
  page.on('console', (message) => {
    if (message.type() === 'error')
      problems.push(`${message.text()} ${message.location().url ?? ''}`)
  })
  await page.goto(url)
  await loaded()
}

const commands = {
  async open({ url, locale, width, height, sharpness }) {
    await page?.context().close()
    const context = await browser.newContext({
      locale,
      viewport: { width, height },
      deviceScaleFactor: sharpness
    })
    problems.length = 0
    await newPage(context, url)
  },
  // Another page of the same browser, which is driven from then on; the first one stays open.
  openAnother: ({ url }) => newPage(page.context(), url),
  async goTo({ index }) {
    page = page.context().pages()[index]
    await page.bringToFront()
  },
  async reload() {
    await page.reload()
    await loaded()
  },
  // `body` is the body of an async function whose parameter is `argument`.
  evaluate: ({ body, argument }) =>
    page.evaluate(([body, argument]) => {
      const AsyncFunction = (async () => {}).constructor
      return new AsyncFunction('argument', body)(argument)
    }, [body, argument]),
  async click({ selector }) {
    await page.locator(selector).first().click()
  },
  // The place is given in parts of the element's width and height.
  async hover({ selector, x, y }) {
    const found = page.locator(selector).first()
    const box = await found.boundingBox()
    await found.hover({ position: { x: x * box.width, y: y * box.height } })
  },
  async fill({ selector, text }) {
    await page.locator(selector).first().fill(text)
  },
  async press({ keys }) {
    await page.keyboard.press(keys)
  },
  async wait({ selector }) {
    const found = page.locator(selector).first()
    await found.waitFor({ timeout: 30000 })
    return found.innerText()
  },
  async screenshot({ path, clip }) {
    const type = path.endsWith('.png') ? { type: 'png' } : { type: 'jpeg', quality: 80 }
    await page.screenshot({ path, clip: clip ?? undefined, ...type })
  },
  problems: () => problems
}

for await (const line of createInterface({ input: process.stdin })) {
  const { command, ...options } = JSON.parse(line)
  try {
    const result = (await commands[command](options)) ?? null
    process.stdout.write(JSON.stringify({ result }) + '\n')
  } catch (error) {
    process.stdout.write(JSON.stringify({ error: `${error.message ?? error}` }) + '\n')
  }
}
await browser.close()
