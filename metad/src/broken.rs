//! What no command does: rows written past all rules. Only with the feature `broken`, for runs that check whether the checkers of a
//! simulation notice.

use crate::machine::rows::Rows;
use crate::state::State;
use crate::state::kv::KvError;
use qsfs_proto::api::Head;
use qsfs_zstor::id::VolumeId;
use qsfs_zstor::record::EncodingRecord;

/// Sets the head of a volume, whatever it was.
pub fn set_head(state: &mut State<&Rows>, id: VolumeId, head: Head) -> Result<(), KvError> {
    if let Some(mut volume) = state.volume(id)? {
        volume.head = head;
        state.write_past_rules(|state| {
            state.put_volume(&volume);
            Ok(())
        })?;
    }
    Ok(())
}

/// Writes a record, wherever it lies.
pub fn put_record(state: &mut State<&Rows>, record: &EncodingRecord) -> Result<(), KvError> {
    if state.record(record.volume, record.datafile)?.is_some() {
        return Ok(());
    }
    state.write_past_rules(|state| state.add(record))
}
