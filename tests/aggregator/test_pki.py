import stat
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from datetime import timedelta

import grpc
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from aggregator.pki import Pki
from tests.support.identities import OPERATOR_PUBLIC
from wardround import tls
from wardround.errors import IdentityError, MessageError, SettingsError, StorageError
from wardround.keyfiles import write_secret

DAY = timedelta(days=1)


class Clock:
    def __init__(self) -> None:
        self.now = tls.utc_now()

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def pki(tmp_path, clock):
    return Pki.open(tmp_path / "pki", "neuro", ["localhost", "127.0.0.1"], clock)


def leaf_of(pki, name="leuven"):
    """(certificate, private key) of a silo, PEM."""
    key_pem = tls.new_leaf_key()
    return pki.issue_silo(tls.csr(key_pem, name), name), key_pem


# --- over real TLS ------------------------------------------------------------------------------------------------------------


@contextmanager
def serving(key_pem: bytes, certificate_pem: bytes, roots: bytes) -> Iterator[int]:
    """A gRPC server that demands client certificates and answers with who its caller is; its port."""

    def who(request: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            peer = tls.peer_of(context.auth_context().get("x509_subject_alternative_name", []), "neuro")
        except IdentityError as error:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        return f"{peer.role} {peer.name}".encode()

    handler = grpc.method_handlers_generic_handler("t", {"Who": grpc.unary_unary_rpc_method_handler(who)})
    server = grpc.server(futures.ThreadPoolExecutor(2), handlers=[handler], options=[("grpc.enable_http_proxy", 0)])
    credentials = grpc.ssl_server_credentials([(key_pem, certificate_pem)], roots, require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


def ask(port: int, roots: bytes, certificate_pem: bytes | None, key_pem: bytes | None) -> str:
    credentials = grpc.ssl_channel_credentials(roots, key_pem, certificate_pem)
    with grpc.secure_channel(f"localhost:{port}", credentials, options=[("grpc.enable_http_proxy", 0)]) as channel:
        return channel.unary_unary("/t/Who")(b"", timeout=5).decode()


def refused(port: int, roots: bytes, certificate_pem: bytes | None, key_pem: bytes | None) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        ask(port, roots, certificate_pem, key_pem)
    return caught.value.code()


@pytest.fixture
def server(pki):
    with serving(*pki.server_credentials, pki.roots_pem) as port:
        yield port


def test_a_silo_is_who_its_certificate_says(pki, server):
    assert ask(server, pki.roots_pem, *leaf_of(pki, "leuven")) == "silo leuven"
    assert ask(server, pki.roots_pem, *leaf_of(pki, "charite")) == "silo charite"


def test_a_token_is_an_enrolment_for_its_silo(pki, server):
    certificate_pem, key_pem, serial = pki.issue_bootstrap("leuven")
    assert ask(server, pki.roots_pem, certificate_pem, key_pem) == "enroll leuven"
    assert serial == tls.serial_of(tls.load_certificate(certificate_pem))
    assert serial != pki.issue_bootstrap("leuven")[2]


def test_an_expired_certificate_gets_no_connection(pki, server, clock):
    clock.now -= tls.LEAF_LIFETIME + DAY
    assert refused(server, pki.roots_pem, *leaf_of(pki)) is grpc.StatusCode.UNAVAILABLE


def test_a_foreign_authority_gets_no_connection(pki, server, tmp_path):
    foreign = Pki.open(tmp_path / "foreign", "neuro", ["localhost"])
    assert refused(server, pki.roots_pem, *leaf_of(foreign)) is grpc.StatusCode.UNAVAILABLE


def test_no_certificate_gets_no_connection(pki, server):
    assert refused(server, pki.roots_pem, None, None) is grpc.StatusCode.UNAVAILABLE


def test_a_silo_does_not_talk_to_a_foreign_server(pki, tmp_path):
    foreign = Pki.open(tmp_path / "foreign", "neuro", ["localhost"])
    with serving(*foreign.server_credentials, pki.roots_pem) as port:
        assert refused(port, pki.roots_pem, *leaf_of(pki)) is grpc.StatusCode.UNAVAILABLE


def test_a_silos_certificate_serves_nobody(pki):
    certificate_pem, key_pem = leaf_of(pki)
    with serving(key_pem, certificate_pem, pki.roots_pem) as port:
        assert refused(port, pki.roots_pem, *leaf_of(pki)) is grpc.StatusCode.UNAVAILABLE


def test_the_servers_certificate_is_no_clients(pki, server):
    key_pem, certificate_pem = pki.server_credentials
    assert refused(server, pki.roots_pem, certificate_pem, key_pem) is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    "sans",
    [
        [],
        ["wardround://neuro/silo/leuven", "wardround://neuro/silo/charite"],
        ["wardround://cardio/silo/leuven"],
    ],
    ids=["none", "two", "foreign federation"],
)
def test_certificates_of_our_own_authority_that_name_nobody(pki, server, sans):
    key_pem = tls.new_leaf_key()
    names = [x509.UniformResourceIdentifier(san) for san in sans]
    public_key = x509.load_pem_x509_csr(tls.csr(key_pem, "x")).public_key()
    certificate = pki._issue(public_key, "x", names, DAY, [x509.ExtendedKeyUsageOID.CLIENT_AUTH])
    assert refused(server, pki.roots_pem, tls.certificate_pem(certificate), key_pem) is grpc.StatusCode.PERMISSION_DENIED


def test_each_certificate_has_one_use(pki):
    # A silo's certificate names no host, so no client takes it for a server's; this is the second lock.
    issued = {
        "silo": leaf_of(pki)[0],
        "enroll": pki.issue_bootstrap("leuven")[0],
        "aggregator": pki.server_credentials[1],
    }
    uses = {}
    for role, pem in issued.items():
        uses[role] = list(tls.load_certificate(pem).extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    client, server = x509.ExtendedKeyUsageOID.CLIENT_AUTH, x509.ExtendedKeyUsageOID.SERVER_AUTH
    assert uses == {"silo": [client], "enroll": [client], "aggregator": [server]}


# --- what it issues -----------------------------------------------------------------------------------------------------------


def test_the_name_comes_from_the_caller_never_from_the_request(pki):
    key = ec.generate_private_key(ec.SECP256R1())
    asks_for_more = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(tls.common_name("charite"))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier("wardround://neuro/silo/charite")]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    certificate = tls.load_certificate(pki.issue_silo(asks_for_more.public_bytes(tls.serialization.Encoding.PEM), "leuven"))
    assert tls.certificate_sans(certificate) == ["wardround://neuro/silo/leuven"]
    assert certificate.subject == tls.common_name("leuven")
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def _request(key) -> bytes:
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(tls.common_name("x"))
        .sign(key, hashes.SHA256())
        .public_bytes(tls.serialization.Encoding.PEM)
    )


def test_a_request_that_does_not_hold(pki):
    der = bytearray(x509.load_pem_x509_csr(tls.csr(tls.new_leaf_key(), "leuven")).public_bytes(tls.serialization.Encoding.DER))
    der[-1] ^= 1
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(tls.serialization.Encoding.PEM)
    for csr_pem, told in (
        (forged, "not signed by the key it asks for"),
        (_request(ec.generate_private_key(ec.SECP384R1())), "P-256"),
        (_request(rsa.generate_private_key(65537, 2048)), "P-256"),
        (b"x", "PEM form"),
        (b"x" * 20_000, "at most"),
    ):
        with pytest.raises(MessageError, match=told):
            pki.issue_silo(csr_pem, "leuven")


@pytest.mark.parametrize("name", ["", "St-Marys", "a/b", "a" * 41, "leuven/../charite"])
def test_a_name_that_is_none(pki, name):
    with pytest.raises(SettingsError, match="silo's name"):
        pki.issue_bootstrap(name)
    with pytest.raises(SettingsError, match="silo's name"):
        pki.issue_silo(tls.csr(tls.new_leaf_key(), "x"), name)


def test_an_enrolment_file_says_when_it_ends(pki, clock):
    data, serial, expires = pki.make_enrollment("leuven", "fed.example.org", 443, OPERATOR_PUBLIC)
    assert abs(expires - clock.now - tls.BOOTSTRAP_LIFETIME) < timedelta(seconds=2)
    assert f"until {expires:%Y-%m-%d %H:%M} UTC" in data.decode().splitlines()[0]
    assert list(yaml.safe_load(data)) == ["host", "port", "federation", "silo", "operatorKey", "ca", "token"]
    assert serial


# --- its folder and its life --------------------------------------------------------------------------------------------------


def test_a_second_start_changes_nothing(pki, tmp_path, clock):
    before = {path.name: path.read_bytes() for path in (tmp_path / "pki").iterdir()}
    assert sorted(before) == ["audit.key", "ca-1.pem", "server.pem"]
    again = Pki.open(tmp_path / "pki", "neuro", ["localhost", "127.0.0.1"], clock)
    assert {path.name: path.read_bytes() for path in (tmp_path / "pki").iterdir()} == before
    assert not again.refresh()


def test_private_files_are_private(pki, tmp_path):
    assert stat.S_IMODE((tmp_path / "pki").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "pki").iterdir()} == {0o600}
    (tmp_path / "pki" / "ca-1.pem").chmod(0o644)
    with pytest.raises(SettingsError, match=r"ca-1\.pem can be read by others"):
        Pki.open(tmp_path / "pki", "neuro", ["localhost"])


def test_another_federations_folder_and_bad_names_are_refused(pki, tmp_path):
    with pytest.raises(SettingsError, match="another federation than cardio"):
        Pki.open(tmp_path / "pki", "cardio", ["localhost"])
    for federation, names in (("Neuro", ["localhost"]), ("neuro", []), ("neuro", ["fé.example"])):
        with pytest.raises(SettingsError):
            Pki.open(tmp_path / "new", federation, names)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be used"):
        Pki.open(tmp_path / "file", "neuro", ["localhost"])


def test_the_server_leaf_renews_at_two_thirds_and_when_its_names_change(pki, tmp_path, clock):
    first = pki.server_pem
    clock.now += tls.LEAF_LIFETIME * 2 / 3 - DAY
    assert not pki.refresh()
    clock.now += 2 * DAY
    assert pki.refresh()
    assert pki.server_pem != first
    renamed = Pki.open(tmp_path / "pki", "neuro", ["fed.example.org"], clock)
    assert tls.certificate_sans(tls.load_certificate(renamed.server_credentials[1])) == [
        "wardround://neuro/aggregator",
        "fed.example.org",
    ]


def issuer_of(pki) -> str:
    return tls.load_certificate(leaf_of(pki)[0]).issuer.rfc4514_string()


def test_two_roots_overlap_so_that_every_silo_learns_the_new_one_first(pki, clock):
    born = clock.now
    assert pki.roots_pem.count(b"BEGIN CERTIFICATE") == 1

    clock.now = born + tls.ROOT_LIFETIME * 2 / 3 + DAY
    assert pki.refresh()
    assert pki.roots_pem.count(b"BEGIN CERTIFICATE") == 2  # announced with every renewal from now on, but
    assert issuer_of(pki) == "CN=wardround neuro root 1"  # the old one still signs

    clock.now = born + tls.ROOT_LIFETIME - 2 * tls.LEAF_LIFETIME + DAY
    assert pki.refresh()
    assert issuer_of(pki) == "CN=wardround neuro root 2"
    assert tls.load_certificate(pki.server_credentials[1]).issuer.rfc4514_string() == "CN=wardround neuro root 2"
    assert pki.roots_pem.count(b"BEGIN CERTIFICATE") == 2  # leaves of the old root live on

    clock.now = born + tls.ROOT_LIFETIME + DAY
    assert pki.refresh()
    assert pki.roots_pem.count(b"BEGIN CERTIFICATE") == 1
    assert tls.load_certificate(pki.roots_pem).subject.rfc4514_string() == "CN=wardround neuro root 2"


def test_leaves_of_both_roots_are_accepted_during_the_overlap(tmp_path):
    # Born so long ago that the second root exists and signs today.
    born = tls.utc_now() - tls.ROOT_LIFETIME + 2 * tls.LEAF_LIFETIME - 10 * DAY
    clock = Clock()
    clock.now = born
    pki = Pki.open(tmp_path / "pki", "neuro", ["localhost"], clock)
    clock.now = born + tls.ROOT_LIFETIME * 2 / 3 + DAY
    pki.refresh()
    clock.now = tls.utc_now() - 20 * DAY
    pki.refresh()
    by_first = leaf_of(pki)
    clock.now = tls.utc_now()
    pki.refresh()
    by_second = leaf_of(pki)
    assert len({tls.load_certificate(leaf[0]).issuer for leaf in (by_first, by_second)}) == 2
    with serving(*pki.server_credentials, pki.roots_pem) as port:
        assert ask(port, pki.roots_pem, *by_first) == ask(port, pki.roots_pem, *by_second) == "silo leuven"


def test_two_processes_that_start_at_once_agree_on_one_root(tmp_path, monkeypatch):
    raced: list[str] = []

    def late(path, data, *, replace):
        # Another process starts between our look and our write.
        if path.name not in raced:
            raced.append(path.name)
            with monkeypatch.context() as other:
                other.setattr("aggregator.pki.write_secret", write_secret)
                Pki.open(tmp_path / "pki", "neuro", ["localhost"])
        write_secret(path, data, replace=replace)

    monkeypatch.setattr("aggregator.pki.write_secret", late)
    ours = Pki.open(tmp_path / "pki", "neuro", ["localhost"])
    assert raced == ["ca-1.pem"]  # what the other made, ours found
    theirs = Pki.open(tmp_path / "pki", "neuro", ["localhost"])
    assert theirs.roots_pem == ours.roots_pem
    assert ours.roots_pem.count(b"BEGIN CERTIFICATE") == 1
    assert ask_once(ours) == "silo leuven"


def ask_once(pki: Pki) -> str:
    with serving(*pki.server_credentials, pki.roots_pem) as port:
        return ask(port, pki.roots_pem, *leaf_of(pki))
