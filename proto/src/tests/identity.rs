//! Files and texts that hold an identity.

use crate::api::{Role, Secret};
use crate::ca::{CaError, CertificateAuthority, LEAF_VALIDITY};
use crate::context::{Context, ContextError};
use crate::identity::{Identity, IdentityError, KEY_FILE, KeyRequest, PeerIdentity, VolumeScope};
use crate::token::{JoinToken, TOKEN_PREFIX, TokenError, secret_hash};
use proptest::prelude::{
    Just, ProptestConfig, any, prop_assert, prop_assert_eq, prop_oneof, proptest,
};
use qsfs_zstor::id::{ClusterId, VolumeId};
use rand::SeedableRng;
use std::fs;
use std::os::unix::fs::PermissionsExt;

fn ca() -> CertificateAuthority {
    CertificateAuthority::create(ClusterId::random(&mut rand::rng())).unwrap()
}

#[test]
fn an_identity_survives_its_files_which_only_the_owner_reads() {
    let dir = tempfile::tempdir().unwrap();
    let identity = ca().issue(Role::Agent, "loc1/n1").unwrap();
    let place = dir.path().join("tls");
    identity.save(&place).unwrap();
    identity.save(&place).unwrap();
    assert_eq!(Identity::load(&place).unwrap(), identity);
    let mut names: Vec<_> = fs::read_dir(&place).unwrap().map(Result::unwrap).collect();
    names.sort_by_key(fs::DirEntry::file_name);
    assert_eq!(names.len(), 3);
    for file in names {
        let mode = file.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{file:?}");
    }
}

#[test]
fn parts_that_do_not_belong_together_are_refused() {
    let (first, second) = (ca(), ca());
    let good = first.issue(Role::Admin, "root").unwrap().to_pem();
    let other = first.issue(Role::Admin, "root").unwrap().to_pem();
    let mut swapped = good.clone();
    swapped.key = other.key;
    let refused = Identity::from_pem(swapped);
    assert!(
        matches!(refused, Err(IdentityError::KeyMismatch)),
        "{refused:?}"
    );
    let mut swapped = good.clone();
    swapped.ca = second.ca_pem().to_owned();
    let refused = Identity::from_pem(swapped);
    assert!(
        matches!(refused, Err(IdentityError::OtherCa)),
        "{refused:?}"
    );
    let mut cut = good.clone();
    cut.certificate.truncate(cut.certificate.len() / 2);
    assert!(Identity::from_pem(cut).is_err());
    let refused = CertificateAuthority::from_pem(first.ca_pem(), second.key_pem());
    assert!(matches!(refused, Err(CaError::KeyMismatch)), "{refused:?}");
    let again = CertificateAuthority::from_pem(first.ca_pem(), first.key_pem()).unwrap();
    assert_eq!(again.fingerprint(), first.fingerprint());
    assert_eq!(again.cluster(), first.cluster());
}

#[test]
fn requests_and_subjects_that_make_no_sense_are_not_signed() {
    let ca = ca();
    let request = KeyRequest::new().unwrap();
    let sign = |csr: &str, role, subject: &str| ca.sign(csr, role, subject, LEAF_VALIDITY);
    assert!(sign("no pem", Role::Admin, "root").is_err());
    let mut flipped = request.csr_pem().to_owned();
    let middle = flipped.len() / 2;
    let other = if flipped.as_bytes()[middle] == b'A' {
        "B"
    } else {
        "A"
    };
    flipped.replace_range(middle..=middle, other);
    assert!(sign(&flipped, Role::Admin, "root").is_err());
    for (role, subject) in [
        (Role::Metad, "one"),
        (Role::Agent, "n1"),
        (Role::Agent, "loc1/n1/x"),
        (Role::Client, "photos"),
        (Role::Admin, "a b"),
        (Role::Admin, ""),
    ] {
        assert!(
            sign(request.csr_pem(), role, subject).is_err(),
            "{role} {subject}"
        );
    }
}

#[test]
fn peers_are_read_as_written() {
    let cluster = ClusterId::from_bytes([1; 16]);
    let volume = VolumeId::from_bytes([2; 16]);
    for (role, subject) in [
        (Role::Metad, "3".to_owned()),
        (Role::Agent, "loc1/n1".to_owned()),
        (Role::Client, volume.to_string()),
        (Role::Client, "*".to_owned()),
        (Role::Admin, "root".to_owned()),
    ] {
        let peer = PeerIdentity::new(cluster, role, subject).unwrap();
        assert_eq!(peer.to_string().parse::<PeerIdentity>().unwrap(), peer);
    }
    let bound = PeerIdentity::new(cluster, Role::Client, volume.to_string()).unwrap();
    assert_eq!(bound.volume_scope(), Some(VolumeScope::One(volume)));
    for bad in [
        "",
        "http://x",
        "qsfs://00/admin/root",
        "qsfs:///admin/",
        "qsfs://a/b/c/d",
    ] {
        assert!(bad.parse::<PeerIdentity>().is_err(), "{bad}");
    }
}

#[test]
fn secrets_are_in_no_debug_output() {
    let identity = ca().issue(Role::Admin, "root").unwrap();
    let context = Context::new(vec!["a:1".into()], identity.clone(), None);
    let ca = ca();
    let token = JoinToken::new(
        Role::Agent,
        ca.cluster(),
        [0; 32],
        vec!["a:1".into()],
        &mut rand::rng(),
    );
    let token = token.unwrap();
    let shown = format!(
        "{identity:?} {:?} {context:?} {ca:?} {token:?}",
        identity.to_pem()
    );
    assert!(!shown.contains("PRIVATE"), "{shown}");
    assert!(!shown.contains(&token.secret().0), "{shown}");
}

#[test]
fn a_context_survives_its_file_and_says_what_is_wrong_with_another() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("etc/cluster.toml");
    let identity = ca().issue(Role::Admin, "root").unwrap();
    let endpoints = vec!["10.0.0.1:7400".to_owned(), "[::1]:7400".to_owned()];
    let context = Context::new(endpoints, identity.clone(), Some("/tmp/state".into()));
    context.save(&path).unwrap();
    assert_eq!(Context::find(Some(&path)).unwrap(), context);
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );
    let text = fs::read_to_string(&path).unwrap();
    let refused = |text: String| {
        let path = dir.path().join("other.toml");
        fs::write(&path, text).unwrap();
        Context::load(&path).unwrap_err().to_string()
    };
    assert!(refused(format!("colour = 1\n{text}")).contains("colour"));
    let admin = text.replace("role = \"admin\"", "role = \"agent\"");
    assert!(refused(admin).contains("its certificate is"));
    let broken = text.replace("-----END PRIVATE KEY-----", "");
    assert!(!refused(broken.clone()).contains(&broken[broken.len() / 2..][..20]));
    assert!(refused(String::new()).contains("missing field"));
    // The PEMs may be files beside it.
    identity.save(dir.path()).unwrap();
    let by_path = format!(
        "cluster = \"{}\"\nrole = \"admin\"\nendpoints = [\"a:1\"]\n\
         certificate = \"cert.pem\"\nkey = \"{KEY_FILE}\"\nca = \"ca.pem\"\n",
        identity.cluster()
    );
    let path = dir.path().join("by-path.toml");
    fs::write(&path, by_path).unwrap();
    assert_eq!(Context::load(&path).unwrap().identity(), &identity);
    let missing = Context::load(&dir.path().join("nothing"));
    assert!(
        matches!(missing, Err(ContextError::Io { .. })),
        "{missing:?}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn tokens_survive_being_carried_and_a_slip_is_noticed(
        role in prop_oneof![Just(Role::Metad), Just(Role::Agent), Just(Role::Client), Just(Role::Admin)],
        cluster: [u8; 16],
        ca_hash: [u8; 32],
        endpoints in proptest::collection::vec("[a-z0-9.:]{1,40}", 1..5),
        seed: u64,
        slip in any::<proptest::sample::Index>(),
    ) {
        let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
        let cluster = ClusterId::from_bytes(cluster);
        let token = JoinToken::new(role, cluster, ca_hash, endpoints, &mut rng).unwrap();
        let text = token.to_string();
        prop_assert_eq!(&text.parse::<JoinToken>().unwrap(), &token);
        prop_assert_eq!(&format!(" {text}\n").parse::<JoinToken>().unwrap(), &token);
        prop_assert_eq!(secret_hash(&token.secret()), token.secret_hash());
        let at = TOKEN_PREFIX.len() + slip.index(text.len() - TOKEN_PREFIX.len());
        let mut slipped = text.clone().into_bytes();
        slipped[at] = if slipped[at] == b'q' { b'r' } else { b'q' };
        let slipped = String::from_utf8(slipped).unwrap();
        prop_assert!(matches!(slipped.parse::<JoinToken>(), Err(TokenError::Damaged(_))));
        prop_assert!(text[..at].parse::<JoinToken>().is_err());
    }

    #[test]
    fn no_text_makes_the_parsers_panic(text in ".{0,200}", tail in "[a-z2-7]{0,300}") {
        let _ = text.parse::<JoinToken>();
        let _ = format!("{TOKEN_PREFIX}{tail}").parse::<JoinToken>();
        let _ = text.parse::<PeerIdentity>();
        let _ = format!("qsfs://{text}").parse::<PeerIdentity>();
        let _ = CertificateAuthority::from_pem(&text, &Secret(tail));
    }
}
