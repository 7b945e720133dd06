-- Request budgets, counted in one atomic step. Called by budget.py, which says what the words mean.
--
-- KEYS[i] is the root of the i-th pool's keys, ARGV[1] the call as JSON; the answer is JSON. Beneath a root lie
--   :meta                     a hash: since, run, low, high, closed, urgent_since, limit:SECONDS,
--                             opened:SECONDS
--   :flight                   a sorted set: tickets by the end of their lease
--   :untold                   the same of requests that ended without telling the count: by the end of the lease if
--                             there was no answer, else by when the answer came
--   :SECONDS:START            the count of the window that begins at START
--   :SECONDS:START:told       a hash: most, taken (what replies said of it)
--   :urgent:SECONDS:START     how many requests of it went to webhooks and people
-- Instants are epoch seconds: of a window on the provider's clock, all others on ours.

local UNSURE = 1    -- seconds between the provider's clock and ours, before a reply told
local SLACK = 0.25  -- seconds that clocks drift, or that a provider's machines disagree, unnoticed

local call = cjson.decode(ARGV[1])
local now = call.now
if not now then
  local time = redis.call('TIME')
  now = time[1] + time[2] / 1000000
end

-- A restarted server may have loaded an old snapshot, and a replica that took over may lack the last writes:
-- both show as a server that is not the one that counted.
local info = redis.pcall('INFO', 'server')
local server = type(info) == 'string' and string.match(info, 'run_id:(%w+)') or 'unnamed'

local function stamp(instant)  -- Lua and cjson print 14 digits: too few for microseconds
  return string.format('%.6f', instant)
end

local function open(i)
  local pool = call.pools[i]
  pool.root = KEYS[i]
  pool.flight, pool.untold, pool.meta = KEYS[i] .. ':flight', KEYS[i] .. ':untold', {}
  local fields = redis.call('HGETALL', KEYS[i] .. ':meta')
  for at = 1, #fields, 2 do pool.meta[fields[at]] = fields[at + 1] end
  if pool.meta.run ~= server then
    pool.meta.run, pool.meta.since = server, stamp(now)
  end
  pool.low = pool.meta.low and pool.meta.low - SLACK or -UNSURE
  pool.high = pool.meta.high and pool.meta.high + SLACK or UNSURE
  return pool
end

local function close(pool)
  local kept, longest, closed = {}, 0, tonumber(pool.meta.closed) or 0
  if closed <= now then pool.meta.closed = nil end
  for field, value in pairs(pool.meta) do
    kept[#kept + 1] = field
    kept[#kept + 1] = value
  end
  for _, limit in ipairs(pool.limits) do longest = math.max(longest, limit.seconds) end
  redis.call('DEL', pool.root .. ':meta')
  redis.call('HSET', pool.root .. ':meta', unpack(kept))
  redis.call('EXPIRE', pool.root .. ':meta', math.ceil(math.max(2 * longest, closed - now) + call.lease))
end

local function flying(pool)
  return redis.call('ZCOUNT', pool.flight, '(' .. stamp(now), '+inf')
end

-- Requests in flight that were sent since counting began: one of them is to tell the count. What a restarted
-- server remembers from before may long be over.
local function probing(pool)
  return redis.call('ZCOUNT', pool.flight, stamp(math.max(now, pool.meta.since + call.lease)), '+inf')
end

-- Requests that the provider may still count: in flight, or ended without an answer.
local function pending(pool)
  return flying(pool) + redis.call('ZCOUNT', pool.untold, '(' .. stamp(now), '+inf')
end

local function name(pool, limit, number)
  return string.format('%s:%d:%d', pool.root, limit.seconds, number * limit.seconds)
end

-- The window of `limit` with this number. One without a counter begins with what is pending.
local function window(pool, limit, number)
  local start = number * limit.seconds
  local w = {
    seconds = limit.seconds, start = start, stop = start + limit.seconds,
    key = name(pool, limit, number),
    opened = 'opened:' .. limit.seconds,
    limit = tonumber(pool.meta['limit:' .. limit.seconds]) or limit.amount,
  }
  w.opens = w.stop - pool.low  -- when the next one has opened for certain
  w.count = tonumber(redis.call('GET', w.key))
  if not w.count and tonumber(pool.meta[w.opened]) == start then  -- there was a counter: evicted, or deleted
    pool.meta.since = stamp(now)
  end
  w.count = w.count or pending(pool)
  local since = tonumber(pool.meta.since)
  if pool.reports and (not pool.meta.low or start - pool.high < since) then
    w.unknown = (tonumber(redis.call('HGET', w.key .. ':told', 'taken')) or 0) < since
  end
  return w
end

-- Requests that may be counted in the window although no reply said so: out now, or ended since it opened.
local function others(pool, w)
  local opened = stamp(w.start - pool.high)
  return redis.call('ZCOUNT', pool.flight, opened, '+inf') + redis.call('ZCOUNT', pool.untold, opened, '+inf')
end

local function keep(pool, w, count)
  local life = math.ceil(w.seconds + math.max(w.seconds, 2 * call.lease))
  redis.call('SET', w.key, count, 'EX', life)
  redis.call('EXPIRE', w.key .. ':told', life)
  if w.start > (tonumber(pool.meta[w.opened]) or 0) then pool.meta[w.opened] = string.format('%d', w.start) end
end

-- Every window that the provider's clock may be in now.
local function current(pool, visit)
  for j, limit in ipairs(pool.limits) do
    local first = math.floor((now + pool.low) / limit.seconds)
    for number = first, math.floor((now + pool.high) / limit.seconds) do
      visit(window(pool, limit, number), j)
    end
  end
end

-- Begin afresh with windows that cannot have opened yet: they were counted when more seemed possible.
local function unopen(pool)
  for _, limit in ipairs(pool.limits) do
    local last = math.floor((now + pool.high) / limit.seconds)
    local opened = (tonumber(pool.meta['opened:' .. limit.seconds]) or 0) / limit.seconds
    if opened > last then
      -- Those further on expire before they open.
      for number = last + 1, math.min(opened, last + 2 + math.ceil(2 * call.lease / limit.seconds)) do
        redis.call('DEL', name(pool, limit, number), name(pool, limit, number) .. ':told')
      end
      pool.meta['opened:' .. limit.seconds] = nil
    end
  end
end

-- Learn from a reply that the provider's clock is `low` to `high` seconds ahead of ours.
local function compare(pool, low, high)
  local before = {low = pool.low, high = pool.high}
  local earliest, latest = tonumber(pool.meta.low) or -UNSURE, tonumber(pool.meta.high) or UNSURE
  local agree = math.max(low, earliest) <= math.min(high, latest)
  if agree then low, high = math.max(low, earliest), math.min(high, latest) end
  pool.meta.low, pool.meta.high = stamp(low), stamp(high)
  pool.low, pool.high = low - SLACK, high + SLACK
  unopen(pool)
  if agree then return end
  -- One of the clocks is not what we took it for. What was counted in windows cut by it lies in others: in each at
  -- most what those had that overlap with it.
  current(pool, function(w, j)
    local limit, count = pool.limits[j], 0
    local first = math.floor((w.start - pool.high + before.low) / limit.seconds)
    for number = first, math.floor((now + before.high) / limit.seconds) do
      count = count + (tonumber(redis.call('GET', name(pool, limit, number))) or 0)
    end
    keep(pool, w, math.max(w.count, count))
  end)
end

-- What others may want of a whole window: the share that the call names, or where whole days were watched as
-- much as they used of late, and half of it again, if that is less.
local WATCHED = 7
local function urgent(pool, seconds, start)
  return string.format('%s:urgent:%d:%d', pool.root, seconds, start)
end

local function reserve(pool, w)
  local most = math.floor(call.leave_share * w.limit)
  if most == 0 or w.seconds < 86400 then return most end
  local since, sum, windows = tonumber(pool.meta.urgent_since) or now, 0, 0
  for back = 1, WATCHED do
    local start = w.start - back * w.seconds
    if start - pool.low < since then break end
    sum = sum + (tonumber(redis.call('GET', urgent(pool, w.seconds, start))) or 0)
    windows = windows + 1
  end
  if windows == 0 then return most end
  local mean = sum / windows
  return math.min(most, math.ceil(1.5 * mean + 2 * math.sqrt(mean)))
end

-- Which part of a window is still to come.
local function ahead(pool, w)
  return math.max(0, math.min(1, 1 - (now + pool.low - w.start) / w.seconds))
end

-- How many requests background work leaves in the window: `leave` (unless others have nothing to spend there) and
-- of the reserve what belongs to the time to come, with `pace` (seconds between two rounds of it) that of the rest
-- as well. Second: when one more fits.
local function held(pool, w)
  local kept = reserve(pool, w)
  local leave, opens = math.floor(kept * ahead(pool, w)), w.opens
  if kept > 0 and w.count < w.limit then  -- it flows back as time passes
    opens = math.min(opens, w.start - pool.low + w.seconds * (1 - (w.limit - w.count) / kept))
  end
  if call.pace then
    local elapsed = now + pool.low - w.start
    local spendable = w.limit - kept * ahead(pool, w)
    opens = math.min(w.opens, w.start - pool.low + (w.count + 1) * w.seconds / spendable - call.pace)
    leave = w.limit - spendable * math.min(1, (elapsed + call.pace) / w.seconds) - 0.000001  -- of rounding
  end
  return (pool.own and 0 or call.leave) + leave, math.max(opens, now)
end

-- Count a request of somebody who leaves nothing to others: so much is kept for the like.
local function watch(pool)
  pool.meta.urgent_since = pool.meta.urgent_since or stamp(now)
  if call.leave_share > 0 then return end
  for _, limit in ipairs(pool.limits) do
    if limit.seconds >= 86400 then
      local start = math.floor((now + (pool.low + pool.high) / 2) / limit.seconds) * limit.seconds
      local key = urgent(pool, limit.seconds, start)
      redis.call('INCR', key)
      redis.call('EXPIRE', key, (WATCHED + 2) * limit.seconds)
    end
  end
end

local verbs = {}

function verbs.take()
  -- The client sends a call again when the connection broke before its answer: then all is done already.
  local ends = #KEYS > 0 and redis.call('ZSCORE', KEYS[1] .. ':flight', call.id)
  local pools, charged, probe, refusal = {}, {}, false, nil

  local function refuse(i, kind, opens, w, j)
    if not refusal or opens > refusal.opens then
      refusal = {pool = i, kind = kind, opens = opens}
      if w then
        refusal.window, refusal.used, refusal.limit, refusal.stop = j, w.count, w.limit, w.stop
      end
    end
  end

  for i = 1, #KEYS do
    local pool = open(i)
    pools[i] = pool
    local closed = tonumber(pool.meta.closed)
    if closed and closed > now then refuse(i, 'closed', closed) end
    current(pool, function(w, j)
      charged[#charged + 1] = {pool, w}
      local left = w.limit - w.count - 1
      local leave, opens = held(pool, w)
      if left < 0 then
        refuse(i, 'spent', w.opens, w, j)
      elseif left < leave then
        refuse(i, 'held', opens, w, j)
      elseif w.unknown and probing(pool) > 0 then
        refuse(i, 'unknown', now)
      end
      probe = probe or w.unknown
    end)
  end

  if ends then return {taken = stamp(ends - call.lease), probe = probe or false} end
  if not refusal then
    for _, charge in ipairs(charged) do keep(charge[1], charge[2], charge[2].count + 1) end
    for _, pool in ipairs(pools) do
      watch(pool)
      redis.call('ZADD', pool.flight, stamp(now + call.lease), call.id)
      redis.call('EXPIRE', pool.flight, math.ceil(2 * call.lease))
    end
  end
  for _, pool in ipairs(pools) do close(pool) end
  if not refusal then return {taken = stamp(now), probe = probe or false} end
  refusal.opens = stamp(refusal.opens)
  return {refusal = refusal, now = stamp(now)}
end

function verbs.settle()
  local taken, shown, soonest, opens = call.taken, false, nil, 0
  local pools = {}
  for i = 1, #KEYS do
    local pool = open(i)
    pools[i] = pool
    local ends = tonumber(redis.call('ZSCORE', pool.flight, call.id))
    local late = not ends or ends <= now

    -- `date` is whole seconds, cut off. The reply was dated after the request was sent and before it arrived.
    if call.date and not late and taken < now + 1 then
      compare(pool, call.date - now, call.date + 1 - taken)
    end

    -- A window that opened meanwhile counts this request too. One whose ticket Redis lost is counted anew.
    local lost = not ends and taken < tonumber(pool.meta.since)
    if ends or lost then
      current(pool, function(w)
        keep(pool, w, lost and not pool.used and w.count + 1 or w.count)
      end)
    end

    local told = pool.used ~= nil
    if told then
      -- An entry outlives its end by a lease: so no reply on its way is older than what is forgotten.
      redis.call('ZREMRANGEBYSCORE', pool.flight, '-inf', stamp(now - call.lease))
      redis.call('ZREMRANGEBYSCORE', pool.untold, '-inf', stamp(now - call.lease))
      redis.call('ZREM', pool.flight, call.id)
      for j, limit in ipairs(pool.limits) do
        local used = pool.used[j]
        pool.meta['limit:' .. limit.seconds] = math.max(1, pool.reported[j])
        local number = math.floor((taken + pool.low) / limit.seconds)
        local last = now + pool.high
        if call.date then last = math.min(last, call.date + 0.999999) end
        local w = window(pool, limit, number)
        local sure = not late and taken >= tonumber(pool.meta.since) and last < w.stop
        local before = redis.call('HMGET', w.key .. ':told', 'most', 'taken')
        local most = math.max(used, tonumber(before[1]) or 0)
        local highest = most + others(pool, w)
        if w.count < most or (sure and w.count > highest) then w.count = highest end
        redis.call('HSET', w.key .. ':told', 'most', most)
        if sure then
          redis.call('HSET', w.key .. ':told', 'taken', stamp(math.max(taken, tonumber(before[2]) or 0)))
        end
        keep(pool, w, w.count)
        told = told and sure
        if pool.limited and used >= pool.reported[j] then
          shown = true
          opens = math.max(opens, w.opens)
        end
      end
    end
    redis.call('ZREM', pool.flight, call.id)
    if ends and not told and (pool.reports or not call.answered) then
      redis.call('ZADD', pool.untold, stamp(call.answered and now or ends), call.id)
      redis.call('EXPIRE', pool.untold, math.ceil(2 * call.lease))
    end
  end

  for _, pool in ipairs(pools) do
    if pool.limited then
      for _, limit in ipairs(pool.limits) do
        local stop = (math.floor((taken + pool.low) / limit.seconds) + 1) * limit.seconds - pool.low
        soonest = math.min(soonest or stop, stop)
      end
    end
  end
  for _, pool in ipairs(pools) do
    if pool.limited then
      local closed = call.retry_at and call.retry_at - pool.low or (not shown and soonest) or 0
      closed = math.max(closed, tonumber(pool.meta.closed) or 0)
      pool.meta.closed = stamp(closed)
      opens = math.max(opens, closed)
    end
    close(pool)
  end
  return {opens = opens > now and stamp(opens) or nil}
end

function verbs.windows()
  local found = {}
  for i = 1, #KEYS do
    local pool = open(i)
    for j, limit in ipairs(pool.limits) do
      local w = window(pool, limit, math.floor((now + (pool.low + pool.high) / 2) / limit.seconds))
      found[#found + 1] = {
        pool = i, window = j, start = w.start, stop = w.stop, limit = w.limit, used = w.count,
        known = not w.unknown, flying = flying(pool), opens = stamp(w.opens), closed = pool.meta.closed,
        reserve = reserve(pool, w), held = math.floor(reserve(pool, w) * ahead(pool, w)),
      }
    end
  end
  return {now = stamp(now), windows = found}
end

return cjson.encode(verbs[call.verb]())
