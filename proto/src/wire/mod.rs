//! The data protocol between volume clients and storage daemons.
//!
//! `message.rs` has the messages as values, `codec.rs` their bytes (encoder and incremental decoder).

mod codec;
mod fence;
mod fields;
mod layer_list;
mod message;

pub use codec::{
    Decoded, Direction, FrameError, FrameLength, HEADER_LEN, MAGIC, decode, encode_reply,
    encode_request, frame_length,
};
pub use message::*;
