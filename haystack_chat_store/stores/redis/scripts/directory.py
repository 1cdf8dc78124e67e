# SPDX-License-Identifier: Apache-2.0
"""The scripts that find, describe and delete whole histories."""

from haystack_chat_store.stores.redis.schema import TIME_LENGTH
from haystack_chat_store.stores.redis.scripts import AGE_BUCKET, NOW, OF_BUCKET, Script

# Tells expired histories from others among the ids that a bucket lists. Reading changes nothing: they stay listed until
# a write, a deletion or a purge removes them.
_STILL_THERE = (
    NOW
    + """
local is_expiring = redis.call('ZCARD', expiries) > 0
local function is_still_there(chat_history_id)
    local expires_at = is_expiring and redis.call('ZSCORE', expiries, chat_history_id)
    return not expires_at or tonumber(expires_at) >= milliseconds
end
"""
)

# How many histories the server passes in the directory in the time in which it looks up one by its id, or more.
_PASSED_MEANWHILE = 5
# The most histories that a script looks up, so that other clients do not wait for long.
_LOOKED_UP = 5000

#: Return the ids of histories of a bucket, the one that changed last first. Keys: those of the bucket. Arguments: a
#: prefix; the ends of its range, as ZRANGEBYLEX takes them; how many ids; the time and the id of a history to begin
#: after, or nothing. Returns the place to go on from, a time and an id, or nothing at the end; then times and ids in
#: turn.
NEWEST = Script(
    OF_BUCKET,
    _STILL_THERE,
    f"""
local prefix, least, greatest, wanted = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local time, chat_history_id = tonumber(ARGV[5]), ARGV[6]
local function is_greater(a, b)  -- by bytes: Lua compares by the rules of the locale
    for index = 1, math.min(#a, #b) do
        local left, right = string.byte(a, index), string.byte(b, index)
        if left ~= right then return left > right end
    end
    return #a > #b
end

local found = {{}}
local total = redis.call('ZCARD', directory)
local matching = prefix == '' and total or redis.call('ZLEXCOUNT', names, least, greatest)
if matching == 0 then return {{'', '', found}} end

local rank = 0
if time then
    rank = redis.call('ZCOUNT', directory, '(' .. ARGV[5], '+inf')
    local beyond = rank + redis.call('ZCOUNT', directory, ARGV[5], ARGV[5])
    while rank < beyond do
        local middle = math.floor((rank + beyond) / 2)
        if is_greater(chat_history_id, redis.call('ZREVRANGE', directory, middle, middle)[1]) then
            beyond = middle
        else
            rank = middle + 1
        end
    end
end

-- Go through the directory for as long as looking up all matching histories would take. With most prefixes, the wanted
-- ones come soon. Scores are asked for only where they are needed: they take the server longer than the ids.
local stop = math.min(rank + {_PASSED_MEANWHILE} * math.min(matching, {_LOOKED_UP}), total)
local step, last = wanted, nil
while rank < stop and #found < 2 * wanted do
    for _, passed in ipairs(redis.call('ZREVRANGE', directory, rank, math.min(rank + step, stop) - 1)) do
        rank, last = rank + 1, passed
        if string.sub(passed, 1, #prefix) == prefix and is_still_there(passed) then
            found[#found + 1], found[#found + 2] = redis.call('ZSCORE', directory, passed), passed
            if #found == 2 * wanted then break end
        end
    end
    step = math.min(2 * step, 1000)
end
if rank == total or #found == 2 * wanted or matching > {_LOOKED_UP} then
    local last_time = rank < total and redis.call('ZSCORE', directory, last)
    return {{last_time or '', last_time and last or '', found}}
end

-- The matching histories are old, or few: look all of them up, and sort them.
local ids, all = redis.call('ZRANGEBYLEX', names, least, greatest), {{}}
for first = 1, #ids, 1000 do  -- Lua's stack may not hold more arguments
    local some = {{unpack(ids, first, math.min(first + 999, #ids))}}
    for index, score in ipairs(redis.call('ZMSCORE', directory, unpack(some))) do
        local score_number = tonumber(score or nil)
        if score_number and is_still_there(some[index]) and (not time or score_number < time
                or score_number == time and is_greater(chat_history_id, some[index])) then
            all[#all + 1] = {{score_number, some[index], score}}
        end
    end
end
table.sort(all, function(a, b) return a[1] > b[1] or a[1] == b[1] and is_greater(a[2], b[2]) end)
found = {{}}
for index = 1, math.min(wanted, #all) do
    found[2 * index - 1], found[2 * index] = all[index][3], all[index][2]
end
if #all <= wanted then return {{'', '', found}} end
return {{found[#found - 1], found[#found], found}}
""",
)

#: Return the ids of histories of a bucket in their order, some at a time. Keys: those of the bucket. Arguments: the
#: ends of the range, as ZRANGEBYLEX takes them; how many ids; a time, for those that have not changed since, or
#: nothing. Returns the id to go on from, or nothing at the end; then the ids.
BY_ID = Script(
    OF_BUCKET,
    _STILL_THERE,
    """
local wanted, updated_before = tonumber(ARGV[3]), tonumber(ARGV[4])
local seen = redis.call('ZRANGEBYLEX', names, ARGV[1], ARGV[2], 'LIMIT', 0, wanted)
local found = {}
for _, chat_history_id in ipairs(seen) do
    local time = updated_before and tonumber(redis.call('ZSCORE', directory, chat_history_id) or nil)
    if (not updated_before or time and time < updated_before) and is_still_there(chat_history_id) then
        found[#found + 1] = chat_history_id
    end
end
return {#seen < wanted and '' or seen[#seen], found}
""",
)

#: Return the ids of the histories of a bucket that have not changed for longest, expired ones included. Keys: those of
#: the bucket. Arguments: a time, for those that have not changed since; how many ids.
OLDEST = Script(OF_BUCKET, "return redis.call('ZRANGEBYSCORE', directory, '-inf', '(' .. ARGV[1], 'LIMIT', 0, ARGV[2])")

_INFO = "'message_count', 'round_count', 'created_at', 'updated_at', 'title', 'meta', 'next_position', 'revision'"

#: Return fields of the hashes of histories. Keys: the bucket's schema version, then each history's hash.
INFOS = Script(f"""
local found = {{}}
for key = 2, #KEYS do found[key - 1] = redis.call('HMGET', KEYS[key], {_INFO}) end
return found
""")

#: Set title and meta of a history. Keys: those of the bucket, the history's hash. Arguments: how many of the following
#: are names of fields and values, in turn; these; then the names of fields to delete. Returns the fields of INFOS.
UPDATE = Script(
    OF_BUCKET,
    f"""
local history, set = KEYS[6], tonumber(ARGV[1])
if redis.call('HEXISTS', history, 'message_count') == 1 then
    if set > 0 then redis.call('HSET', history, unpack(ARGV, 2, 1 + set)) end
    if #ARGV > 1 + set then redis.call('HDEL', history, unpack(ARGV, 2 + set)) end
end
return redis.call('HMGET', history, {_INFO})
""",
)

#: Return the letters of the roles and the times of messages. Keys: the bucket's schema version, then the roles and the
#: times of each history. Arguments: of each, the first position and the last.
TIMES = Script(f"""
local found = {{}}
for index = 1, #ARGV, 2 do
    local first, last = tonumber(ARGV[index]), tonumber(ARGV[index + 1])
    found[index] = redis.call('GETRANGE', KEYS[index + 1], first, last)
    found[index + 1] = redis.call('GETRANGE', KEYS[index + 2], {TIME_LENGTH} * first, {TIME_LENGTH} * (last + 1) - 1)
end
return found
""")

#: Delete histories of a bucket. Keys: those of the bucket, then those of the histories. Arguments: a time, for those
#: that have not changed since, or nothing; the revision that a history that is there must have, or nothing; the
#: histories' ids. Returns how many there were, or CHANGED and a revision.
DELETE = Script(
    OF_BUCKET,
    f"""
redis.call('ZCARD', directory)
redis.call('ZCARD', names)
local expiring, deleted = redis.call('ZCARD', expiries), 0
local kept_revision = tonumber(redis.call('GET', deleted_revision) or 0)
local updated_before, greatest = tonumber(ARGV[1]), kept_revision
local of_history = (#KEYS - 5) / (#ARGV - 2)
for index = 3, #ARGV do
    local time = updated_before and tonumber(redis.call('ZSCORE', directory, ARGV[index]) or nil)
    if not time or time < updated_before then
        local first = 6 + (index - 3) * of_history
        local revision = tonumber(redis.pcall('HGET', KEYS[first], 'revision') or nil)  -- it may be damaged
        if revision and ARGV[2] ~= '' and tonumber(ARGV[2]) ~= revision then return {{'CHANGED', revision}} end
        greatest = math.max(greatest, revision or 0)
        if redis.call('UNLINK', unpack(KEYS, first, first + of_history - 1)) > 0 then deleted = deleted + 1 end
        for _, key in ipairs({{directory, names, expiries}}) do redis.call('ZREM', key, ARGV[index]) end
    end
end
if greatest > kept_revision then redis.call('SET', deleted_revision, greatest) end
if expiring > 0 then
    {NOW}
    {AGE_BUCKET}
end
if redis.call('EXISTS', directory) == 0 then redis.call('UNLINK', KEYS[1]) end
return deleted
""",
)

#: Return all ids that a bucket lists, expired ones included. Keys: those of the bucket.
ALL = Script(OF_BUCKET, "return redis.call('ZUNION', 3, directory, names, expiries)")
