"""What a remote can make a DHT node hold or do, at most. Units are in the names."""

from __future__ import annotations

from typing import Final

from protocol.instants import SECOND_NS
from protocol.limits import KIB

# --- messages ---------------------------------------------------------------------------------------

#: Contacts in one answer: the largest k that a policy may have.
MAX_CONTACTS: Final = 64

#: Contacts in the answer to a ping, chosen from so many entries: 6 times 20 pings a minute show a node some 100
#: near peers a minute, at 600 bytes each.
MAX_PONG_CONTACTS: Final = 6
PONG_WINDOW: Final = 16

#: Providers named in one answer; more are found by asking further peers.
MAX_PROVIDERS_IN_ANSWER: Final = 32

#: Records in one answer, and their bytes: an answer stays below 256 KiB (protocol.limits.MAX_RPC_BYTES).
MAX_RECORDS_IN_ANSWER: Final = 32
MAX_RECORD_BYTES_IN_ANSWER: Final = 128 * KIB

#: Addresses of one contact: two transports by IPv4 and IPv6, and some relays.
MAX_CONTACT_ADDRESSES: Final = 8

#: A query is a few hundred bytes, with a record its bytes too.
MAX_QUERY_BYTES: Final = 16 * KIB

#: 96 contacts with 8 addresses of 256 characters would be 210 KB; usual is 2 KB.
MAX_ANSWER_BYTES: Final = 256 * KIB

#: Contacts in one page of a full table.
MAX_PAGE_CONTACTS: Final = 64

#: Segments whose digests are compared in one round of full-table anti-entropy.
MAX_DIGESTS: Final = 256

# --- serving ----------------------------------------------------------------------------------------

#: Queries answered to one peer within FLOOD_WINDOW_NS; more are dropped unread. The hungriest honest peer (a
#: join, a sweep after heavy loss, a full-table walk) sends one peer under 20 a second for a short time.
MAX_QUERIES_PER_WINDOW: Final = 200
FLOOD_WINDOW_NS: Final = 10 * SECOND_NS

#: Peers counted one by one within a window; the rest share one count.
MAX_COUNTED_PEERS: Final = 1024

# --- storage ----------------------------------------------------------------------------------------

#: A record's value: a signed statement or a list of addresses, not a file.
MAX_RECORD_VALUE_BYTES: Final = 4 * KIB
MAX_NAMESPACE_CHARS: Final = 32
MAX_RECORD_NAME_CHARS: Final = 128

#: Records of different issuers at one key: coordinators that state something about one Island.
MAX_RECORDS_PER_KEY: Final = 32

#: Records of one issuer, over all keys, that one node stores: a coordinator judges up to 10,000 Islands, whose
#: keys are spread over the network; only in a network of fewer than 50 nodes would more of them meet here.
MAX_RECORDS_PER_ISSUER: Final = 4096

#: Records that arrived over one peer's connection.
MAX_RECORDS_PER_SENDER: Final = 4096

#: All records, and their bytes.
MAX_RECORDS: Final = 16_384
MAX_STORED_RECORD_BYTES: Final = 32 * 1024 * KIB

#: A record is kept at most this long, whatever its expiry says.
MAX_RECORD_TTL_NS: Final = 48 * 3600 * SECOND_NS

#: Providers of one key: more are not told apart by those who ask (they get 32).
MAX_PROVIDERS_PER_KEY: Final = 128

#: Of these from one network group, so that one hosting account does not fill a key.
MAX_PROVIDERS_PER_GROUP: Final = 16

#: Keys that one peer may provide here, providers, and all provider records here (about 100 bytes each). Whoever
#: provides something stands in the node's address book, a KiB each, until that expires.
MAX_KEYS_PER_PROVIDER: Final = 256
MAX_PROVIDERS: Final = 16_384
MAX_PROVIDER_RECORDS: Final = 131_072

#: A store that is full is searched for what has expired at most once in this time, however many knock.
SWEEP_GAP_NS: Final = SECOND_NS

# --- own orders -------------------------------------------------------------------------------------

#: Lookups that run at once; the node's own user gets an error result (`Found`, `Stored` with nothing) beyond
#: it.
MAX_OPERATIONS: Final = 1024

#: Records and provider records that a node keeps told. 64 Cargos and some roles and regions; a coordinator's
#: statements about 10,000 Islands.
MAX_OWN_ENTRIES: Final = 16_384

#: Open calls of one node over all operations; more wait in their lookups.
MAX_OPEN_CALLS: Final = 4096
