-- wrk's side of the load test: searches whose bodies are the lines of a file, in turn; one JSON line of figures at the end.
-- wrk -s infra/load/search.lua URL -- PATH FILE [KEY]; infra/load/run.py calls it.

local threads = {}

function setup(thread)
    table.insert(threads, thread)
end

function init(arguments)
    path, bodies, n, failures = arguments[1], {}, math.random(1000), 0
    for line in io.lines(arguments[2]) do
        table.insert(bodies, line)
    end
    headers = {["Content-Type"] = "application/json"}
    if arguments[3] then
        headers["X-API-Key"] = arguments[3]
    end
end

function request()
    n = n + 1
    return wrk.format("POST", path, headers, bodies[n % #bodies + 1])
end

function response(status)
    if status ~= 200 then
        failures = failures + 1
    end
end

function done(summary, latency, requests)
    local failures = summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout
    for _, thread in ipairs(threads) do
        failures = failures + thread:get("failures")
    end
    local seconds = summary.duration / 1e6
    io.write(string.format('\n{"seconds":%.1f,"requests":%d,"failures":%d,"p50_ms":%.1f,"p95_ms":%.1f,"p99_ms":%.1f,"requests_per_s":%.1f}\n',
        seconds, summary.requests, failures, latency:percentile(50) / 1000, latency:percentile(95) / 1000,
        latency:percentile(99) / 1000, summary.requests / seconds))
end
