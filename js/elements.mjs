// Small pieces of the pages: elements, and numbers as people read them.
import { api } from '../../scripts/api.js'

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties)
  made.append(...children)
  return made
}

export function button(label, press, title = '') {
  return element('button', { type: 'button', textContent: label, title, onclick: press })
}

export const setText = (target, text) => {
  if (target.textContent !== text) target.textContent = text
}

// `fill('(0) of (1)', 2, 5)` is '2 of 5'. The texts of locales/ have their values in this form.
export const fill = (text, ...values) => text.replace(/\((\d)\)/g, (_, index) => values[index])

export const viewURL = ({ filename, subfolder, type }, more = {}) =>
  api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type, ...more })}`)

export function formatNumber(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return '–'
  const size = Math.abs(value)
  if (size && (size < 1e-3 || size >= 1e5)) return value.toExponential(2).replace('e+', 'e')
  return String(Number(value.toPrecision(4)))
}

// 100000 is read as 100 000, with thin spaces.
export const formatCount = (count) => String(count).replace(/\B(?=(\d{3})+$)/g, '\u202f')

export function formatDuration(seconds) {
  const whole = Math.round(seconds)
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60]
  const two = (number) => String(number).padStart(2, '0')
  const rest = `${two(minutes)}:${two(whole % 60)}`
  return hours ? `${hours}:${rest}` : rest.replace(/^0/, '')
}

export function formatBytes(bytes) {
  const units = ['B', 'KiB', 'MiB', 'GiB']
  const power = bytes < 1024 ? 0 : Math.min(3, Math.floor(Math.log2(bytes) / 10))
  return `${(bytes / 1024 ** power).toFixed(power ? 1 : 0)} ${units[power]}`
}
