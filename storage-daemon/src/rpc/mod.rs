//! The daemon's control plane: its own administration service, and its dealings with the metadata
//! cluster. Nothing here is on the path of data.

mod admin;
mod care;
mod metadata;
mod observe;
mod registration;

pub use self::admin::AdminService;
pub use self::care::Care;
pub use self::metadata::MetadataAccess;
pub use self::observe::observe;
pub use self::registration::run as register_and_report;
