// The arithmetic of the chart: nothing here touches the page.

// The exponential moving average, divided by the weight that it has collected, so that the first
// values are not drawn towards 0 (the bias correction of Adam). Values that are no numbers stay out.
export function smooth(values, weight) {
  let average = 0
  let collected = 0
  return values.map((value) => {
    if (value === null || !Number.isFinite(value)) return null
    average = weight * average + (1 - weight) * value
    collected = weight * collected + (1 - weight)
    return average / collected
  })
}

// What a curve of many points looks like on few pixels: for each column the first, the lowest, the
// highest and the last point. `toColumn` gives the place of an x, ascending.
export function reduceToColumns(x, y, toColumn) {
  const points = []
  let column = NaN
  let first, low, high, last
  const flush = () => {
    if (Number.isNaN(column)) return
    points.push([column, first])
    if (low !== first) points.push([column, low])
    if (high !== low) points.push([column, high])
    if (last !== high) points.push([column, last])
  }
  for (let index = 0; index < x.length; index++) {
    const value = y[index]
    if (value === null || !Number.isFinite(value)) continue
    const place = Math.round(toColumn(x[index]))
    if (place !== column) {
      flush()
      column = place
      first = low = high = value
    } else if (value < low) low = value
    else if (value > high) high = value
    last = value
  }
  flush()
  return points
}

// The range that holds a share of the values, so that one outlier does not flatten the rest.
export function rangeOf(values, share = 1) {
  const stride = Math.max(1, Math.floor(values.length / 2000))
  const some = values.filter(
    (value, index) => index % stride === 0 && value !== null && Number.isFinite(value)
  )
  if (!some.length) return null
  some.sort((a, b) => a - b)
  const cut = Math.floor(((1 - share) / 2) * some.length)
  return [some[cut], some[some.length - 1 - cut]]
}

// Round numbers, about `count` of them, within a range.
export function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count)
  const power = 10 ** Math.floor(Math.log10(rough))
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.99)
  const found = []
  for (let at = Math.ceil(low / step); at * step <= high * (1 + 1e-12); at++)
    found.push(Number((at * step).toPrecision(12)))
  return found
}

export function logTicks(low, high, count) {
  const [from, to] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))]
  const each = (digits) => {
    const found = []
    for (let power = from; power <= to; power++)
      for (const digit of digits) found.push(Number((digit * 10 ** power).toPrecision(6)))
    return found.filter((value) => value >= low && value <= high)
  }
  const decades = each([1])
  if (decades.length > count) return decades.filter((_, at) => at % Math.ceil(decades.length / count) === 0)
  const finer = [[1, 2, 5], [1, 1.5, 2, 3, 5, 7]].map(each)
  const enough = [decades, ...finer].filter((found) => found.length >= 2 && found.length <= count)
  return enough.at(-1) ?? ticks(low, high, count)
}

// The index of the entry of an ascending list that lies nearest.
export function nearest(sorted, value) {
  let [low, high] = [0, sorted.length - 1]
  while (high - low > 1) {
    const middle = (low + high) >> 1
    if (sorted[middle] < value) low = middle
    else high = middle
  }
  return Math.abs(sorted[low] - value) <= Math.abs(sorted[high] - value) ? low : high
}
