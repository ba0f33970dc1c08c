export { Client, openClient, VERSION } from './client.js'
export { isPeer, keyOfCapability, keyOfCargo, keyOfName, keyOfPeer, keyOfRecord, keyOfRegion, keyOfRole } from './keys.js'
export { openRecord, sealRecord } from './records.js'
export { CallFailed, LinkLost, RPC_PROTOCOL } from './rpc.js'
