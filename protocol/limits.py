"""Every bound of the protocol, with its reason.

A remote peer can never make us hold or do an unbounded amount of anything: what it may cause is
listed here. Units are in the names.
"""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB

# --- frames -------------------------------------------------------------------------------------

#: A control message (accept, cancel, ping, one tick's tokens) is a few hundred bytes; 64 KiB leaves room
#: for 8 sequences with 20 top_logprobs each and still fits one yamux window.
MAX_CONTROL_BYTES: Final = 64 * KIB

#: A job offer carries the whole conversation. 2 MiB is some 500,000 tokens of English text, more than
#: any context length that Islands offer, and what the gateway accepts as an HTTP body.
MAX_OFFER_BYTES: Final = 2 * MIB

#: One RPC body. Records and adverts are small; larger things travel on streams of their own.
MAX_RPC_BYTES: Final = 256 * KIB

#: An advert lists Cargos and speeds. 128 KiB holds MAX_ADVERT_CARGOS entries with the longest names (about
#: 700 bytes each, three times that in other scripts).
MAX_ADVERT_BYTES: Final = 128 * KIB

#: Envelope fields around a body (issuer, signature, sequence number, tag): under 256 bytes, doubled.
MAX_ENVELOPE_OVERHEAD_BYTES: Final = 512

#: A receipt is a dozen fixed-size fields.
MAX_RECEIPT_BYTES: Final = 4 * KIB

#: Excerpt of a remote's own words that we are willing to repeat in an error or a log line.
MAX_REMOTE_TEXT_CHARS: Final = 500

# --- jobs ---------------------------------------------------------------------------------------

#: Tokens that one frame may hold. One tick of one sequence gives 1; after a hand-over or with
#: speculation a few dozen.
MAX_TOKENS_PER_FRAME: Final = 256

#: Bytes of text that one token may release. A piece is at most some 100 bytes; text held back for a
#: stop string or for a UTF-8 border comes out with a later token.
MAX_TOKEN_TEXT_CHARS: Final = 8 * KIB

#: Tokens in a prompt given as ids, and in the tokens handed over on a resume: the largest context
#: length known in the field is 10 million; 262,144 is the largest that a volunteer's machine holds.
MAX_CONTEXT_TOKENS: Final = 262_144

#: OpenAI's own bounds: 4 stop strings there; 16 here, for templates that add theirs.
MAX_STOPS: Final = 16
MAX_STOP_CHARS: Final = 256

#: OpenAI: top_logprobs 0..20.
MAX_TOP_LOGPROBS: Final = 20

#: OpenAI: 300 logit-bias entries are accepted by its models; more cost time in each step.
MAX_LOGIT_BIAS: Final = 300

#: Messages in a conversation, tools in a request.
MAX_CHAT_MESSAGES: Final = 4096
MAX_TOOLS: Final = 128
MAX_TOOL_CALLS: Final = 128

#: A GBNF grammar or a JSON schema. Grammar states grow with it.
MAX_CONSTRAINT_CHARS: Final = 64 * KIB

#: How many tokens an Island may be ahead of what the consumer took before it must pause the sequence.
#: 64 is 0.3 to 2 s of generation: enough to hide any round trip, little enough to hold per job.
DEFAULT_TOKEN_WINDOW: Final = 64
MAX_TOKEN_WINDOW: Final = 4096

# --- RPC ----------------------------------------------------------------------------------------

#: Requests that one peer may have open with us at once; more are refused, not queued.
MAX_RPC_INFLIGHT_PER_PEER: Final = 64

#: Characters of a method name.
MAX_METHOD_CHARS: Final = 64

#: Longest time a caller may ask us to keep its request alive.
MAX_RPC_DEADLINE_MS: Final = 60_000

# --- adverts ------------------------------------------------------------------------------------

#: Cargos that one Island may offer at once.
MAX_ADVERT_CARGOS: Final = 64
MAX_NAME_CHARS: Final = 128
MAX_ADDRESS_CHARS: Final = 256
MAX_ADDRESSES: Final = 16

#: Islands that one coordinator keeps adverts of. One advert is about 1 KiB decoded.
MAX_ISLANDS_PER_COORDINATOR: Final = 10_000
